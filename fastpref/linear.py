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
from fastpref.operands import Operands, Rows, compute_dtype, mm
from fastpref.parallel import Shard
from fastpref.schedule import Plan, plan
from fastpref.scratch import lend, nbytes, scratch

WORTH_GATHERING = 0.9
"""Share of rows that count, up to which a CPU gathers them; with more it works on all."""


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


class _Chunk(NamedTuple):
    """Rows ``start:end``, or those of them that :attr:`live` counts from ``start``."""

    start: int
    end: int
    live: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """The chunk's part of ``x (n,)``."""
        x = x[self.start : self.end]
        return x if self.live is None else x.index_select(0, self.live)

    def rows_of(self, x: Rows) -> Rows:
        """The chunk's part of a matrix."""
        x = x.cut(self.start, self.end)
        return x if self.live is None else x.pick(self.live)


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


def plan_for(num_rows: int, weight: Tensor, memory_budget: int | None) -> Plan:
    """The plan of a call; the same whatever needs a gradient."""
    v, size = weight.shape
    return plan(num_rows, v, size, weight.element_size(), weight.device.type, memory_budget)


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


def _kept_tile(
    kept: Tensor, p: Plan, vocab_size: int, r0: int, r1: int, v0: int, v1: int
) -> Tensor:
    """The block of ``kept`` that holds rows ``r0:r1`` of the tile ``v0:v1``."""
    width = min(p.kept_tiles * p.tile, vocab_size)
    start = r0 * width + (r1 - r0) * v0
    return kept[start : start + (r1 - r0) * (v1 - v0)].view(r1 - r0, v1 - v0)


def new_state(num_rows: int, like: Tensor) -> Tensor:
    """The ``state`` of :class:`fastpref.backends.RowKernels` before the first tile."""
    state = like.new_zeros((6, num_rows))
    state[0] = -math.inf
    state[2] = math.nan
    return state


def forward(
    hidden: Rows, weight: Tensor, bias: Tensor | None, targets: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Saved]:
    """Log-probabilities ``(N,)`` of N rows, statistics ``(5, N)`` or ``(5, 0)``, and what the
    backward needs."""
    kernels = backends.select(problem.backend, weight)
    n, v = len(hidden), weight.shape[0]
    p = plan_for(n, weight, problem.memory_budget)
    dtype = compute_dtype(weight.dtype)
    make = weight.new_empty
    shapes = saved_shapes(n, v, weight.shape[1], p, problem)
    saved = Saved(
        make(shapes[0]),
        make(shapes[1], dtype=dtype),
        make(shapes[2], dtype=dtype),
        lend(*shapes[3], dtype=weight.dtype, device=weight.device),
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
    with scratch(weight.device, nbytes(Operands.size(p, hidden, weight), acc_bytes)) as arena:
        ops = Operands(arena, p, hidden, weight)
        acc_buffer = arena.take(acc_bytes // dtype.itemsize, dtype=dtype)
        for r0, r1 in p.chunks(n):
            h = ops.rows(hidden.cut(r0, r1))
            state = new_state(r1 - r0, logp)
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
                mm(z, h, w.t())
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
                    mm(acc, operand, w, accumulate=t > 0)
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
    hidden: Rows,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    saved: Saved,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of all of hidden, weight and bias; an empty tensor where none is needed."""
    kernels = backends.select(problem.backend, weight)
    # what arrives at an ignored row, NaN too, is nobody's
    grad = grad.masked_fill(targets == problem.ignore_index, 0.0).contiguous()
    unit = saved.unit_grad
    shape = hidden.x.shape if problem.need_hidden_grad else unit.shape
    dhidden = unit.new_zeros(shape) if hidden.index is not None else unit.new_empty(shape)
    if problem.need_hidden_grad:
        for part in hidden.parts():
            scaled = dhidden if hidden.index is None else torch.empty_like(unit[part])
            kernels.scale_rows_(scaled, unit[part], grad[part])
            if hidden.index is not None:
                dhidden.index_copy_(0, hidden.index[part], scaled)
    if not problem.keeps:
        return dhidden, weight.new_empty((0, weight.shape[1])), weight.new_empty((0,))
    return dhidden, *_head_gradients(grad, hidden, weight, bias, targets, saved, problem)


def _rescale_rows_(
    kernels: backends.RowKernels, out: Tensor, x: Rows, factor: Tensor, previous: Tensor | None
) -> None:
    """``scale_rows_`` of the rows whose factor is not the ``previous`` one that ``out`` was made
    with.

    A row's factor moves from tile to tile only where its maximum grew, which gets rare.
    """
    moved = None if previous is None else (factor != previous).nonzero()[:, 0]
    if moved is None or 2 * moved.numel() > factor.numel():
        for part, block in x.blocks():
            kernels.scale_rows_(out[part], block, factor[part])
        return
    for part, block in x.pick(moved).blocks():
        rows = torch.empty_like(out[: len(block)])
        kernels.scale_rows_(rows, block, factor[moved[part]])
        out.index_copy_(0, moved[part], rows)


def _add_target_rows_(
    kernels: backends.RowKernels,
    out: Tensor,
    x: Rows,
    targets: Tensor,
    factor: Tensor,
    start: int,
) -> None:
    """``add_target_rows_``; of rows that have to be gathered a CPU takes those it needs."""
    if x.index is not None and out.device.type == "cpu":
        hit = ((targets >= start) & (targets < start + len(out))).nonzero()[:, 0]
        x, targets, factor = x.pick(hit), targets[hit], factor[hit]
    for part, block in x.blocks():
        kernels.add_target_rows_(out, block, targets[part], factor[part], start)


def _live_chunks(toward: Tensor, away: Tensor, p: Plan) -> list[_Chunk]:
    """The chunks of rows for the backward of the head, without rows whose two factors ``(N,)`` are
    both 0.

    That is so on CPU, where looking costs nothing. A GPU would have to be waited for; there such
    rows are multiplied by their 0.
    """
    every = [_Chunk(*bounds) for bounds in p.chunks(away.numel())]
    if away.device.type != "cpu":
        return every
    counts = (toward != 0.0) | (away != 0.0)
    chunks = []
    for chunk in every:
        live = chunk.of(counts).nonzero()[:, 0]
        if live.numel() > WORTH_GATHERING * (chunk.end - chunk.start):
            chunks.append(chunk)
        elif live.numel():
            chunks.append(chunk._replace(live=live))
    return chunks


def _head_gradients(
    grad: Tensor,
    hidden: Rows,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    saved: Saved,
    problem: Problem,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias: a vocabulary tile at a time, its rows summed in the compute
    dtype."""
    kernels = backends.select(problem.backend, weight)
    v, size = weight.shape
    p = plan_for(len(hidden), weight, problem.memory_budget)
    dtype = compute_dtype(weight.dtype)
    targets = targets.masked_fill(targets == problem.ignore_index, -1)
    shard = Shard.of(problem.group, weight)
    targets = targets if shard is None else shard.localise(targets)
    q, coef, maximum = saved.rows
    toward = problem.scale * grad * q
    away = -problem.scale * grad * coef
    bias_c = None if bias is None else bias.to(dtype)
    dbias = grad.new_zeros((v if problem.need_bias_grad else 0,))
    slice_bytes = p.tile * size * dtype.itemsize
    with scratch(weight.device, nbytes(Operands.size(p, hidden, weight), slice_bytes)) as arena:
        ops = Operands(arena, p, hidden, weight)
        slice_buffer = arena.take(p.tile * size, dtype=dtype)
        # after the scratch, so that a first call does not take the slab of the forward's
        trained = v if problem.need_weight_grad else 0
        dweight = lend(trained, size, dtype=weight.dtype, device=weight.device)

        def exponentials(t: int, chunk: _Chunk, v0: int, v1: int) -> tuple[Tensor, Tensor]:
            """G of a tile, kept or recomputed, and the factor that takes its rows to the
            gradient."""
            top, factor = chunk.of(maximum), chunk.of(away)
            z = ops.logits(top.numel(), v1 - v0)
            if t < p.kept_tiles:
                kept = _kept_tile(saved.kept, p, v, chunk.start, chunk.end, v0, v1)
                shrink = torch.exp(chunk.of(saved.offsets[t]) - top)
                factor = torch.where(factor == 0.0, 0.0, factor * shrink)
                if ops.converts:
                    return z.copy_(kept if chunk.live is None else kept[chunk.live]), factor
                if chunk.live is not None:
                    kept = torch.index_select(kept, 0, chunk.live, out=z)
                return kept, factor
            mm(z, ops.rows(chunk.rows_of(hidden)), ops.tile(weight[v0:v1]).t())
            # Started at the final maximum, the same sweep stores E under it.
            state = new_state(top.numel(), z)
            state[0] = top
            operand = ops.low_tile(*z.shape) if ops.mixed else z
            tile_bias = None if bias_c is None else bias_c[v0:v1]
            kernels.sweep_(
                *(z, operand, state, None, None, chunk.of(targets), tile_bias, v0),
                *(problem.scale, problem.softcap, False),
            )
            return operand, factor

        chunks = _live_chunks(toward, away, p)
        # On CPU the scaled rows of a lone chunk outlive the tile, unless their buffer holds other
        # operands in between.
        lone = weight.device.type == "cpu" and len(chunks) == 1 and not ops.converts
        gathers = lone and chunks[0].rows_of(hidden).index is not None
        previous: Tensor | None = None
        for t, (v0, v1) in enumerate(p.tiles(v)):
            if problem.need_weight_grad and dweight.dtype == dtype:
                total = dweight[v0:v1]
            else:
                total = slice_buffer[: (v1 - v0) * size].view(v1 - v0, size)
            column_sum = slice_buffer.new_zeros(v1 - v0)
            if not chunks:
                total.zero_()
            for i, chunk in enumerate(chunks):
                operand, factor = exponentials(t, chunk, v0, v1)
                if problem.need_bias_grad:
                    column_sum.addmv_(operand.to(dtype).t(), factor)
                if problem.need_weight_grad:
                    x = chunk.rows_of(hidden)
                    scaled = ops.row_buffer[: factor.numel() * size].view(-1, size)
                    _rescale_rows_(kernels, scaled, x, factor, previous)
                    overwritten = gathers and t + 1 >= p.kept_tiles
                    previous = factor if lone and not overwritten else None
                    mm(total, operand.t(), scaled, accumulate=i > 0)
                    _add_target_rows_(kernels, total, x, chunk.of(targets), chunk.of(toward), v0)
            if problem.need_weight_grad and total.data_ptr() != dweight[v0:v1].data_ptr():
                dweight[v0:v1].copy_(total)
            if problem.need_bias_grad:
                dbias[v0:v1] = column_sum
    if problem.need_bias_grad:
        counted = (targets >= 0) & (targets < v)
        here = (targets.clamp(0, v - 1),)
        dbias.index_put_(here, torch.where(counted, toward, 0.0), accumulate=True)
    return dweight, dbias.to(weight.dtype)
