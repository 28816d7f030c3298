"""`linear_token_kl`: KL(reference || policy) per token over the vocabulary, a chunk of rows at a
time.

The gradient in the policy's logits is ``p - r``. Formed before the product, not as a difference of
two products, it is right where the two models are close; so the maximum and the sum of a row must
be known first, and a chunk holds its logits over all of the vocabulary. Per tile of it a product
and the sweep of ``fastpref.linear``; then one kernel gives KL and gradient. ``dKL/dhidden`` is
formed in the forward; the backward scales it, and recomputes chunks for the gradient of a trainable
head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import backends, checks, reference
from fastpref.library import differentiable, fake, op
from fastpref.linear import WORTH_GATHERING, new_state
from fastpref.operands import Rows, compute_dtype, mm, multiplies_low
from fastpref.projection import whole_rows
from fastpref.registered import refuse_second_derivative
from fastpref.schedule import DEFAULT_BUDGET, plan
from fastpref.scratch import nbytes, scratch

REF_NAMES = checks.Names("ref_hidden", "ref_weight", "hidden's rows", "ref_bias")
_SMALLEST_CHUNK = 16


class _Model(NamedTuple):
    """Hidden states of the rows, and the head."""

    hidden: Rows
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float

    def part_of_bias(self, start: int, end: int) -> Tensor | None:
        """The bias of a tile."""
        return None if self.bias is None else self.bias[start:end]


class _Chunk(NamedTuple):
    """Rows of both models: raw products over all of the vocabulary, and what the sweep found."""

    rows: slice
    policy: list[Tensor]
    """Tile after tile, each ``(n, w)``; side by side in memory, not rows of ``V``."""
    reference: list[Tensor]
    state: Tensor
    ref_state: Tensor
    kl: Tensor
    """KL of the rows, after the last of :meth:`_Pass.operands`."""
    shared: Tensor
    """S of the rows."""


class _Pass:
    """A pass over the rows of two models, a chunk at a time."""

    def __init__(
        self, policy: _Model, reference: _Model, backend: str, memory_budget: int | None
    ) -> None:
        total, weight = len(policy.hidden), policy.weight
        self.kernels = backends.select(backend, weight)
        self.dtype = compute_dtype(weight.dtype)
        self.device = weight.device
        self.policy, self.reference = (
            m._replace(bias=None if m.bias is None else m.bias.to(self.dtype))
            for m in (policy, reference)
        )
        size, item = weight.shape[0], weight.element_size()
        self.mixed = multiplies_low(weight.dtype, self.device)
        self.converts = weight.dtype != self.dtype and not self.mixed
        kind = "cpu" if self.device.type == "cpu" else "cuda"
        budget = DEFAULT_BUDGET[kind] if memory_budget is None else memory_budget
        widest = max(weight.shape[1], reference.weight.shape[1])
        sums = weight.shape[1] if weight.dtype != self.dtype else 0
        each = (2 * size + widest + sums) * self.dtype.itemsize
        self.rows = min(max(_SMALLEST_CHUNK, budget // each), total)
        p = plan(self.rows, size, weight.shape[1], item, kind, memory_budget)
        self.tiles = p.tiles(size)
        self.buffers = [
            (self.rows * size, self.dtype),
            (self.rows * size, self.dtype),
            (self.rows * p.tile if self.mixed else 0, weight.dtype),
            (self.rows * widest, weight.dtype if self.mixed else self.dtype),
            (p.tile * widest if self.converts else 0, self.dtype),
            (self.rows * sums, self.dtype),
        ]

    def chunks(self) -> Iterator[_Chunk]:
        """The chunks, one after the other in the same memory."""
        with scratch(self.device, nbytes(*(n * d.itemsize for n, d in self.buffers))) as arena:
            mine, theirs, self.low, self.row_buffer, self.tile_buffer, self.sums = (
                arena.take(n, dtype=d) for n, d in self.buffers
            )
            total = len(self.policy.hidden)
            for start in range(0, total, max(self.rows, 1)):
                rows = slice(start, min(start + self.rows, total))
                z, state = self._logits(mine, self.policy, rows)
                r, ref_state = self._logits(theirs, self.reference, rows)
                kl = state.new_zeros(state.shape[1])
                shared = torch.minimum(state[1], ref_state[1])
                yield _Chunk(rows, z, r, state, ref_state, kl, shared)

    def operands(self, chunk: _Chunk, with_grad: bool) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Per tile: its columns; ``S (p - r)`` times the slope of the cap, as the products take it;
        and memory of that shape in the compute dtype, which may be the operand."""
        pairs = zip(chunk.policy, chunk.reference, strict=True)
        for (start, end), (z, r) in zip(self.tiles, pairs, strict=True):
            operand = self.low[: z.numel()].view(z.shape) if self.mixed else z
            self.kernels.kl_tile_(
                z,
                r,
                operand if with_grad else None,
                chunk.state,
                chunk.ref_state,
                self.policy.part_of_bias(start, end),
                self.reference.part_of_bias(start, end),
                self.policy.scale,
                self.policy.softcap,
                self.reference.scale,
                self.reference.softcap,
                chunk.kl,
            )
            yield start, end, operand, z

    def _logits(self, buffer: Tensor, model: _Model, rows: slice) -> tuple[list[Tensor], Tensor]:
        """Raw products of a chunk with all of the vocabulary; M and R of its rows."""
        part = model.hidden.cut(rows.start, rows.stop)
        h = part.operand(self.row_buffer, self.converts)
        n, tiles, state = len(h), [], new_state(len(h), buffer)
        nobody = torch.full((n,), len(model.weight), device=self.device)
        for start, end in self.tiles:
            tile = buffer[n * start : n * end].view(n, end - start)
            mm(tile, h, self.tile_of(model.weight, start, end).t())
            self.kernels.sweep_(
                *(tile, None, state, None, None, nobody, model.part_of_bias(start, end), start),
                *(model.scale, model.softcap, False),
            )
            tiles.append(tile)
        return tiles, state

    def tile_of(self, weight: Tensor, start: int, end: int) -> Tensor:
        """Rows of the weight as an operand."""
        return Rows(weight[start:end]).operand(self.tile_buffer, self.converts)


@op("linear_token_kl")
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    scale: float,
    softcap: float,
    ref_scale: float,
    ref_softcap: float,
    backend: str,
    memory_budget: int | None,
    need_hidden_grad: bool,
) -> tuple[Tensor, Tensor]:
    policy = _Model(Rows(hidden), weight, bias, scale, softcap)
    reference = _Model(Rows(ref_hidden), ref_weight, ref_bias, ref_scale, ref_softcap)
    work = _Pass(policy, reference, backend, memory_budget)
    kl = hidden.new_empty((hidden.shape[0],), dtype=work.dtype)
    unit = hidden.new_empty((hidden.shape[0] if need_hidden_grad else 0, hidden.shape[1]))
    for chunk in work.chunks():
        out = unit[chunk.rows]
        total = out if out.dtype == work.dtype else work.sums[: out.numel()].view(out.shape)
        for start, end, operand, _ in work.operands(chunk, need_hidden_grad):
            if need_hidden_grad:
                w = work.tile_of(weight, start, end)
                mm(total, operand, w, accumulate=start > 0)
        kl[chunk.rows] = chunk.kl
        if need_hidden_grad:
            work.kernels.scale_rows_(out, total, scale / chunk.shared)
    return kl, unit


@fake(_forward)
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    n = hidden.shape[0]
    return (
        hidden.new_empty((n,), dtype=compute_dtype(hidden.dtype)),
        hidden.new_empty((n if rest[-1] else 0, hidden.shape[1])),
    )


@op("linear_token_kl_backward")
def _backward(
    grad: Tensor,
    unit: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    scale: float,
    softcap: float,
    ref_scale: float,
    ref_softcap: float,
    backend: str,
    memory_budget: int | None,
    need_head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dhidden = torch.empty_like(unit)
    if len(unit):
        backends.select(backend, unit).scale_rows_(dhidden, unit, grad)
    if not need_head_grad:
        return dhidden, weight.new_empty((0, weight.shape[1])), weight.new_empty((0,))
    live = None
    # looking costs nothing on a CPU; a GPU would have to be waited for
    if grad.device.type == "cpu":
        found = grad.nonzero()[:, 0]
        live = found if len(found) < WORTH_GATHERING * len(grad) else None
    rows = Rows(hidden, live)
    grad = grad if live is None else grad[live]
    policy = _Model(rows, weight, bias, scale, softcap)
    reference = _Model(Rows(ref_hidden, live), ref_weight, ref_bias, ref_scale, ref_softcap)
    work = _Pass(policy, reference, backend, memory_budget)
    dweight = hidden.new_empty(weight.shape, dtype=work.dtype)
    dbias = dweight.new_zeros(weight.shape[0])
    for chunk in work.chunks():
        factor = scale * grad[chunk.rows] / chunk.shared
        scaled = work.row_buffer[: len(factor) * hidden.shape[1]].view(len(factor), -1)
        for part, block in rows.cut(chunk.rows.start, chunk.rows.stop).blocks():
            work.kernels.scale_rows_(scaled[part], block, factor[part])
        for start, end, operand, wide in work.operands(chunk, True):
            mm(dweight[start:end], operand.t(), scaled, accumulate=chunk.rows.start > 0)
            if work.mixed:
                wide.copy_(operand)
            dbias[start:end].addmv_(wide.t(), factor)
    if len(rows) == 0:
        dweight.zero_()
    return dhidden, dweight.to(weight.dtype), dbias.to(weight.dtype)


@fake(_backward)
def _(
    grad: Tensor, unit: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = weight.shape if rest[-1] else (0, weight.shape[1])
    return torch.empty_like(unit), weight.new_empty(shape), weight.new_empty(shape[:1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.options = inputs[6:-1]


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_token_kl")
    *inputs, unit = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    found = _backward(grad.contiguous(), unit, *inputs, *ctx.options, needs[1] or needs[2])
    return *(x if need else None for x, need in zip(found, needs, strict=True)), *(None,) * 10


differentiable(_forward, _differentiate, _save)


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ref_scale: float | None = None,
    ref_softcap: float | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Tensor:
    """KL(reference || policy) of the next-token distributions, in nats, without ``[tokens,
    vocab]``.

    Equals, with ``log_p`` and ``log_r`` the log-softmax of the policy's and the reference's logits,
    ``(log_r.exp() * (log_r - log_p)).sum(-1)``.

    Args:
        hidden: The policy's last hidden states. Shape ``(..., H)``; fp32, bf16, fp16 or float64.
        weight: The policy's head. Shape ``(V, H)``.
        ref_hidden: The reference's hidden states. Shape ``(..., H_ref)``, leading shape of
            ``hidden``.
        ref_weight: The reference's head. Shape ``(V, H_ref)``.
        bias: The policy's bias. Shape ``(V,)``.
        ref_bias: The reference's bias. Shape ``(V,)``.
        scale: Multiplies the policy's logits.
        softcap: Soft cap of the policy's logits, or None.
        ref_scale: Multiplies the reference's logits; None takes ``scale``.
        ref_softcap: Soft cap of the reference's logits; None takes ``softcap``.
        backend: As in :func:`fastpref.linear_logprobs`.
        memory_budget: Bytes for a chunk of rows: the logits of both models, its hidden states as
            operands, sums; the head's gradient is summed in fp32 beside it. Default 1 GiB on CUDA,
            256 MiB on CPU.

    Returns:
        Shape ``(...)``, fp32 (float64 for float64), each >= 0 up to rounding. Differentiable in
        ``hidden``, ``weight`` and ``bias``; the reference gets no gradient.

    Raises:
        ValueError: Shapes or devices disagree.
        TypeError: Wrong or mixed dtypes.
        RuntimeError: The result is differentiated twice.

    Numerics:
        Logits are fp32. Equal policy and reference give exactly 0. ``dKL/dhidden`` is held until
        the backward; a trainable head recomputes its chunks there.

    Source:
        Zeng et al., Token-level Direct Preference Optimization, arXiv:2404.11999, equation 6.
    """
    token = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    ref_hidden, ref_weight = ref_hidden.detach(), ref_weight.detach()
    ref_bias = None if ref_bias is None else ref_bias.detach()
    hidden, weight, bias = checks.projection(hidden, weight, token, bias)
    ref_hidden, ref_weight, ref_bias = checks.projection(
        ref_hidden, ref_weight, token, ref_bias, names=REF_NAMES
    )
    for cap in (softcap, ref_softcap):
        checks.check_options(cap, memory_budget)
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight: expected {weight.shape[0]} rows as weight, got {ref_weight.shape[0]}: "
            "the two models must share a vocabulary"
        )
    ref_scale = scale if ref_scale is None else ref_scale
    ref_softcap = softcap if ref_softcap is None else ref_softcap
    if backend == "reference":
        return reference.linear_token_kl(
            *(hidden, weight, ref_hidden, ref_weight, bias, ref_bias),
            *(scale, softcap, ref_scale, ref_softcap),
        )
    checks.no_tangents(hidden, weight, bias)
    kl, _ = _forward(
        *_rows_of(hidden, weight, bias),
        *_rows_of(ref_hidden, ref_weight, ref_bias),
        *(float(scale), float(softcap or 0.0), float(ref_scale), float(ref_softcap or 0.0)),
        *(backend, memory_budget),
        hidden.requires_grad and torch.is_grad_enabled(),
    )
    result: Tensor = kl.view(hidden.shape[:-1])
    return result


def _rows_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Flat, in the layout that kernels read."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return whole_rows(flat), whole_rows(weight), None if bias is None else bias.contiguous()
