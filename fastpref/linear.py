"""The schedule of the projection op, written once: tiles of logits through a backend's row kernels
and vendor GEMMs.

Per chunk of rows, over vocabulary tiles: ``z = h @ W_tile.T`` into scratch, one sweep turns it into
``E = exp(z - M)`` without the target's column, and, where hidden needs a gradient, ``acc += E @
W_tile`` while the tile is warm. So ``dlogp/dhidden`` is ready when the forward ends (row scales
commute with the matrix product), and the backward is a row scaling, plus, for a trainable head,
``dW_tile = E_tile.T @ (c * hidden)`` from the E that was kept or from a recomputed tile. No
elementwise pass over ``[N, V]`` happens in the backward.

Work in units of N*H*V flops: no gradient 2; frozen head 4; trainable 6 where E is kept, 8 where it
is recomputed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import backends
from fastpref.parallel import Shard
from fastpref.schedule import Plan, plan
from fastpref.scratch import Arena, lend, nbytes, scratch

# A product this narrow is summed term by term by some CPU libraries (MKL on AMD): the error grows
# with the root of the number of terms. So it is made of short sums.
NARROW_ROWS, NARROW_COLUMNS, SHORT_SUM = 4, 12, 256


class Problem(NamedTuple):
    """What both passes need to know besides the tensors."""

    scale: float
    softcap: float
    ignore_index: int
    backend: str
    memory_budget: int | None
    need_hidden_grad: bool
    need_weight_grad: bool
    need_bias_grad: bool
    with_stats: bool
    group: str
    """Name of the process group over which the vocabulary is sharded; empty if it is whole."""

    @property
    def keeps(self) -> bool:
        """Whether the head itself is trained."""
        return self.need_weight_grad or self.need_bias_grad


class Saved(NamedTuple):
    """What the forward leaves for the backward; empty where nobody needs it."""

    unit_grad: Tensor
    """``dlogp/dhidden``, ``(N, H)``, dtype of hidden."""
    rows: Tensor
    """q, coef and final M, ``(3, N)`` in the compute dtype."""
    offsets: Tensor
    """M under which each kept tile was stored, ``(kept_tiles, N)``."""
    kept: Tensor
    """E of the kept tiles, flat: chunk after chunk, in a chunk tile after tile. Dtype of hidden."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums and results: float64 for float64, else fp32."""
    return torch.promote_types(dtype, torch.float32)


def plan_for(hidden: Tensor, weight: Tensor, memory_budget: int | None) -> Plan:
    """The plan of a call; the same whatever needs a gradient."""
    return plan(
        hidden.shape[0],
        weight.shape[0],
        weight.shape[1],
        hidden.element_size(),
        hidden.device.type,
        memory_budget,
    )


def saved_shapes(
    num_rows: int, vocab_size: int, hidden_size: int, p: Plan, problem: Problem
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of the :class:`Saved` tensors."""
    needs_rows = problem.need_hidden_grad or problem.keeps
    kept = p.kept_tiles if problem.keeps else 0
    return (
        (num_rows, hidden_size) if problem.need_hidden_grad else (0, hidden_size),
        (3, num_rows) if needs_rows else (3, 0),
        (kept, num_rows),
        (num_rows * min(kept * p.tile, vocab_size),),
    )


class _Operands:
    """The GEMMs, and the conversion of their operands where the device has no low-precision product
    with fp32 output.

    On CUDA a GEMM takes bf16 or fp16 and writes fp32. Elsewhere operands are converted, tile by
    tile, into scratch.
    """

    def __init__(self, arena: Arena, p: Plan, hidden: Tensor, weight: Tensor) -> None:
        self.dtype = compute_dtype(hidden.dtype)
        self.mixed = hidden.dtype != self.dtype and hidden.device.type == "cuda"
        self.converts = hidden.dtype != self.dtype and not self.mixed
        self.gemm_dtype = hidden.dtype if self.mixed else self.dtype
        size = weight.shape[1]
        rows, tile = min(p.rows, hidden.shape[0]), min(p.tile, weight.shape[0])
        self.z = arena.take(rows * tile, dtype=self.dtype)
        self.low = arena.take(rows * tile if self.mixed else 0, dtype=hidden.dtype)
        self.row_buffer = arena.take(rows * size, dtype=self.gemm_dtype)
        self.tile_buffer = arena.take(tile * size if self.converts else 0, dtype=self.dtype)

    @staticmethod
    def size(p: Plan, hidden: Tensor, weight: Tensor) -> int:
        """Bytes of scratch for the tensors above."""
        wide = compute_dtype(hidden.dtype).itemsize
        rows, tile = min(p.rows, hidden.shape[0]), min(p.tile, weight.shape[0])
        size = weight.shape[1]
        low = rows * tile * hidden.element_size()
        return nbytes(rows * tile * wide, low, rows * size * wide, tile * size * wide)

    def rows(self, x: Tensor) -> Tensor:
        """A chunk of hidden as a GEMM operand."""
        return self._convert(x, self.row_buffer)

    def tile(self, w: Tensor) -> Tensor:
        """A tile of the weight as a GEMM operand."""
        return self._convert(w, self.tile_buffer)

    def logits(self, n: int, width: int) -> Tensor:
        """An uninitialised ``(n, width)`` tile of logits."""
        return self.z[: n * width].view(n, width)

    def low_tile(self, n: int, width: int) -> Tensor:
        """An uninitialised ``(n, width)`` tile of E in the GEMM's dtype."""
        return self.low[: n * width].view(n, width)

    def _convert(self, x: Tensor, buffer: Tensor) -> Tensor:
        if not self.converts:
            return x
        return buffer[: x.numel()].view(x.shape).copy_(x)

    def mm(self, out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
        """``out = a @ b`` or ``out += a @ b``, out in the compute dtype."""
        narrow = out.shape[0] < NARROW_ROWS or out.shape[1] < NARROW_COLUMNS
        if self.mixed and accumulate:
            torch.addmm(out, a, b, out_dtype=self.dtype, out=out)
        elif self.mixed:
            torch.mm(a, b, out_dtype=self.dtype, out=out)
        elif narrow and out.device.type == "cpu":
            if not accumulate:
                out.zero_()
            for k in range(0, a.shape[1], SHORT_SUM):
                out += a[:, k : k + SHORT_SUM] @ b[k : k + SHORT_SUM]
        elif accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)


def _kept_tile(
    kept: Tensor, p: Plan, vocab_size: int, r0: int, r1: int, v0: int, v1: int
) -> Tensor:
    """The block of ``kept`` that holds rows ``r0:r1`` of the tile ``v0:v1``."""
    width = min(p.kept_tiles * p.tile, vocab_size)
    start = r0 * width + (r1 - r0) * v0
    return kept[start : start + (r1 - r0) * (v1 - v0)].view(r1 - r0, v1 - v0)


def _new_state(num_rows: int, like: Tensor) -> Tensor:
    state = like.new_zeros((6, num_rows))
    state[0] = -math.inf
    state[2] = math.nan
    return state


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Saved]:
    """Log-probabilities ``(N,)``, statistics ``(5, N)`` or ``(5, 0)``, and what the backward
    needs."""
    kernels = backends.select(problem.backend, hidden)
    n, v = hidden.shape[0], weight.shape[0]
    p = plan_for(hidden, weight, problem.memory_budget)
    dtype = compute_dtype(hidden.dtype)
    make = hidden.new_empty
    shapes = saved_shapes(n, v, weight.shape[1], p, problem)
    saved = Saved(
        make(shapes[0]),
        make(shapes[1], dtype=dtype),
        make(shapes[2], dtype=dtype),
        lend(*shapes[3], dtype=hidden.dtype, device=hidden.device),
    )
    logp = make((n,), dtype=dtype)
    stats = make((5, n if problem.with_stats else 0), dtype=dtype)
    rows = saved.rows if saved.rows.shape[1] == n else make((3, n), dtype=dtype)
    kept_tiles = p.kept_tiles if problem.keeps else 0
    bias_c = None if bias is None else bias.to(dtype)
    targets = targets.masked_fill(targets == problem.ignore_index, -1)
    shard = Shard.of(problem.group, weight)
    local = targets if shard is None else shard.localise(targets)
    in_place = saved.unit_grad.dtype == dtype
    acc_bytes = 0 if in_place else min(p.rows, n) * weight.shape[1] * dtype.itemsize
    with scratch(hidden.device, nbytes(_Operands.size(p, hidden, weight), acc_bytes)) as arena:
        ops = _Operands(arena, p, hidden, weight)
        acc_buffer = arena.take(acc_bytes // dtype.itemsize, dtype=dtype)
        for r0, r1 in p.chunks(n):
            h = ops.rows(hidden[r0:r1])
            state = _new_state(r1 - r0, logp)
            unit = saved.unit_grad[r0:r1] if problem.need_hidden_grad else None
            acc = unit
            if unit is not None and not in_place:
                acc = acc_buffer[: unit.numel()].view(unit.shape)
            for t, (v0, v1) in enumerate(p.tiles(v)):
                w = ops.tile(weight[v0:v1])
                keep = _kept_tile(saved.kept, p, v, r0, r1, v0, v1) if t < kept_tiles else None
                z = ops.logits(r1 - r0, v1 - v0)
                if keep is not None and keep.dtype == dtype:
                    z = keep
                ops.mm(z, h, w.t())
                operand = z
                if ops.mixed:
                    operand = ops.low_tile(r1 - r0, v1 - v0) if keep is None else keep
                kernels.sweep_(
                    z,
                    operand if keep is not None or acc is not None else None,
                    state,
                    saved.offsets[t, r0:r1] if keep is not None else None,
                    acc if t else None,
                    local[r0:r1],
                    None if bias_c is None else bias_c[v0:v1],
                    v0,
                    problem.scale,
                    problem.softcap,
                    problem.with_stats,
                )
                if keep is not None and keep.data_ptr() != operand.data_ptr():
                    keep.copy_(operand)
                if acc is not None:
                    ops.mm(acc, operand, w, accumulate=t > 0)
            if shard is not None:
                shard.merge_(state, acc, targets[r0:r1])
            kernels.combine_(
                state,
                targets[r0:r1],
                v if shard is None else shard.vocab_size,
                problem.softcap,
                problem.scale,
                acc if shard is None else None,
                weight,
                unit if shard is None else None,
                logp[r0:r1],
                rows[0, r0:r1],
                rows[1, r0:r1],
                stats[:, r0:r1] if problem.with_stats else None,
            )
            if shard is not None and unit is not None and acc is not None:
                q, coef = rows[0, r0:r1], rows[1, r0:r1]
                shard.hidden_grad_(unit, acc, weight, local[r0:r1], q, coef, problem.scale)
            rows[2, r0:r1] = state[0]
    return logp, stats, saved


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    saved: Saved,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor where none is needed."""
    kernels = backends.select(problem.backend, hidden)
    dhidden = torch.empty_like(saved.unit_grad)
    if problem.need_hidden_grad:
        kernels.scale_rows_(dhidden, saved.unit_grad, grad.contiguous())
    if not problem.keeps:
        return dhidden, weight.new_empty((0, weight.shape[1])), weight.new_empty((0,))
    return dhidden, *_head_gradients(grad, hidden, weight, bias, targets, saved, problem)


def _rescale_rows_(
    kernels: backends.RowKernels, out: Tensor, x: Tensor, factor: Tensor, previous: Tensor | None
) -> None:
    """``scale_rows_`` of the rows whose factor is not the ``previous`` one that ``out`` was made
    with.

    A row's factor moves from tile to tile only where its maximum grew, which gets rare.
    """
    moved = None if previous is None else (factor != previous).nonzero()[:, 0]
    if moved is None or 2 * moved.numel() > factor.numel():
        kernels.scale_rows_(out, x, factor)
    elif moved.numel():
        rows = torch.empty_like(out[: moved.numel()])
        kernels.scale_rows_(rows, x.index_select(0, moved), factor[moved])
        out.index_copy_(0, moved, rows)


def _head_gradients(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    saved: Saved,
    problem: Problem,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias: a vocabulary tile at a time, its rows summed in the compute
    dtype."""
    kernels = backends.select(problem.backend, hidden)
    n, v, size = hidden.shape[0], weight.shape[0], weight.shape[1]
    p = plan_for(hidden, weight, problem.memory_budget)
    dtype = compute_dtype(hidden.dtype)
    targets = targets.masked_fill(targets == problem.ignore_index, -1)
    shard = Shard.of(problem.group, weight)
    targets = targets if shard is None else shard.localise(targets)
    q, coef, maximum = saved.rows
    toward = problem.scale * grad * q
    away = -problem.scale * grad * coef
    bias_c = None if bias is None else bias.to(dtype)
    dbias = grad.new_zeros((v if problem.need_bias_grad else 0,))
    slice_bytes = p.tile * size * dtype.itemsize
    with scratch(hidden.device, nbytes(_Operands.size(p, hidden, weight), slice_bytes)) as arena:
        ops = _Operands(arena, p, hidden, weight)
        slice_buffer = arena.take(p.tile * size, dtype=dtype)
        # after the scratch, so that a first call does not take the slab of the forward's
        trained = v if problem.need_weight_grad else 0
        dweight = lend(trained, size, dtype=weight.dtype, device=weight.device)

        def exponentials(t: int, r0: int, r1: int, v0: int, v1: int) -> tuple[Tensor, Tensor]:
            """G of a tile, kept or recomputed, and the factor that takes its rows to the
            gradient."""
            if t < p.kept_tiles:
                kept = _kept_tile(saved.kept, p, v, r0, r1, v0, v1)
                shrink = torch.exp(saved.offsets[t, r0:r1] - maximum[r0:r1])
                factor = torch.where(away[r0:r1] == 0.0, 0.0, away[r0:r1] * shrink)
                return (ops.logits(r1 - r0, v1 - v0).copy_(kept) if ops.converts else kept), factor
            z = ops.logits(r1 - r0, v1 - v0)
            ops.mm(z, ops.rows(hidden[r0:r1]), ops.tile(weight[v0:v1]).t())
            # Started at the final maximum, the same sweep stores E under it.
            state = _new_state(r1 - r0, z)
            state[0] = maximum[r0:r1]
            operand = ops.low_tile(r1 - r0, v1 - v0) if ops.mixed else z
            tile_bias = None if bias_c is None else bias_c[v0:v1]
            kernels.sweep_(
                *(z, operand, state, None, None, targets[r0:r1], tile_bias, v0),
                *(problem.scale, problem.softcap, False),
            )
            return operand, away[r0:r1]

        # On CPU the scaled rows of a lone chunk outlive the tile, unless the buffer converts
        # operands.
        reusable = hidden.device.type == "cpu" and p.rows >= n and not ops.converts
        previous: Tensor | None = None
        for t, (v0, v1) in enumerate(p.tiles(v)):
            if problem.need_weight_grad and dweight.dtype == dtype:
                total = dweight[v0:v1]
            else:
                total = slice_buffer[: (v1 - v0) * size].view(v1 - v0, size)
            column_sum = slice_buffer.new_zeros(v1 - v0)
            for r0, r1 in p.chunks(n):
                operand, factor = exponentials(t, r0, r1, v0, v1)
                if problem.need_bias_grad:
                    column_sum.addmv_(operand.to(dtype).t(), factor)
                if problem.need_weight_grad:
                    scaled = ops.row_buffer[: (r1 - r0) * size].view(r1 - r0, size)
                    _rescale_rows_(kernels, scaled, hidden[r0:r1], factor, previous)
                    previous = factor if reusable else None
                    ops.mm(total, operand.t(), scaled, accumulate=r0 > 0)
                    kernels.add_target_rows_(
                        total, hidden[r0:r1], targets[r0:r1], toward[r0:r1], v0
                    )
            if problem.need_weight_grad and total.data_ptr() != dweight[v0:v1].data_ptr():
                dweight[v0:v1].copy_(total)
            if problem.need_bias_grad:
                dbias[v0:v1] = column_sum
    if problem.need_bias_grad:
        counted = (targets >= 0) & (targets < v)
        here = (targets.clamp(0, v - 1),)
        dbias.index_put_(here, torch.where(counted, toward, 0.0), accumulate=True)
    if n == 0:
        dweight.zero_()
    return dweight, dbias.to(weight.dtype)
