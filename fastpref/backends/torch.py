"""The row kernels in plain torch: runs on any device, and is the readable twin of the compiled
ones.

``fastpref.backends`` documents the signatures, which every backend shares.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOWEST_EXPONENT = -1.0e4  # exp of it is 0 in every dtype, and 0 * it is 0 where 0 * -inf is NaN


def available() -> bool:
    """True: plain torch is always there."""
    return True


def why_unavailable() -> str:
    """The empty string: plain torch is always there."""
    return ""


def _logits_(tile: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Logits in the place of raw products."""
    if bias is not None:
        tile.add_(bias)
    if scale != 1.0:
        tile.mul_(scale)
    if softcap > 0.0:
        tile.div_(softcap).tanh_().mul_(softcap)
    return tile


def sweep_(
    tile: Tensor,
    out: Tensor | None,
    state: Tensor,
    offset: Tensor | None,
    acc: Tensor | None,
    targets: Tensor,
    bias: Tensor | None,
    start: int,
    scale: float,
    softcap: float,
    with_stats: bool,
) -> None:
    """See :func:`fastpref.backends.RowKernels.sweep_`."""
    width = tile.shape[1]
    counts = targets >= 0
    tile = _logits_(tile.clone() if out is None else tile, bias, scale, softcap)
    max_old, sum_old = state[0].clone(), state[1].clone()
    local = targets - start
    hit = counts & (local >= 0) & (local < width)
    column = local.clamp(0, width - 1)[:, None]
    z_target = tile.gather(1, column)[:, 0]
    state[2] = torch.where(hit, z_target, state[2])
    if with_stats:
        state[3].add_(torch.where(counts, tile.sum(1), 0.0))
    tile.scatter_(1, column, torch.where(hit, -math.inf, z_target)[:, None])
    max_new = torch.where(counts, torch.maximum(max_old, tile.amax(1)), max_old)
    base = torch.where(max_new == -math.inf, 0.0, max_new)
    shrink = torch.where(max_old == max_new, 1.0, torch.exp(max_old - base))
    exponent = tile.sub_(base[:, None])
    gap = exponent.clamp(min=_LOWEST_EXPONENT) if with_stats else None
    if softcap > 0.0:
        # d = 1 - (z / softcap)^2, with z = exponent + base; finite, so that 0 * d is 0 in the
        # target column
        slope = ((exponent + base[:, None]) / softcap).square_().neg_().add_(1.0)
        slope.clamp_(min=0.0)
    e = exponent.exp_()
    state[0] = max_new
    state[1] = torch.where(counts, sum_old * shrink + e.sum(1), sum_old)
    if gap is not None:
        moved = torch.where(shrink == 0.0, 0.0, (max_old - max_new) * sum_old)
        moved = torch.where(max_old == max_new, 0.0, moved)
        carried = torch.where(shrink == 0.0, 0.0, shrink * (state[4] + moved))
        state[4] = torch.where(counts, carried + gap.mul_(e).sum(1), state[4])
        state[5] = torch.where(counts, state[5] * shrink**2 + e.square().sum(1), state[5])
    if offset is not None:
        offset.copy_(max_new)
    if acc is not None:
        acc.mul_(torch.where(counts, shrink, 1.0)[:, None])
    if out is not None:
        if softcap > 0.0:
            e.mul_(slope)
        e.masked_fill_(~counts[:, None], 0.0)
        if out.data_ptr() != e.data_ptr():
            out.copy_(e)


def combine_(
    state: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float,
    scale: float,
    acc: Tensor | None,
    weight: Tensor,
    hidden_grad: Tensor | None,
    logp: Tensor,
    q: Tensor,
    coef: Tensor,
    stats: Tensor | None,
) -> None:
    """See :func:`fastpref.backends.RowKernels.combine_`."""
    max_other, sum_other, z_target = state[0], state[1], state[2]
    ignored, alone = targets < 0, sum_other == 0.0
    log_sum = torch.where(alone, -math.inf, sum_other.log() + max_other)
    a = log_sum - z_target
    other = torch.where(alone, 0.0, torch.sigmoid(a))
    # as log_softmax: NaN where the target's logit is +inf, or where no logit is finite
    bad = z_target.isnan() | (z_target == math.inf) | (alone & (z_target == -math.inf))
    certain = torch.where(alone, 0.0, torch.nn.functional.logsigmoid(-a))
    slope = 1.0 - (z_target / softcap) ** 2 if softcap > 0.0 else torch.ones_like(z_target)
    nan = torch.where(bad, math.nan, 0.0)
    logp.copy_((certain + nan).masked_fill(ignored, 0.0))
    q.copy_((torch.where(alone, 0.0, other * slope) + nan).masked_fill(ignored, 0.0))
    coef.copy_((torch.where(alone, 0.0, other / sum_other) + nan).masked_fill(ignored, 0.0))
    if hidden_grad is not None and acc is not None:
        rows = weight[targets.clamp(0, vocab_size - 1)].to(acc.dtype)
        unit = scale * (q[:, None] * rows - coef[:, None] * acc)
        hidden_grad.copy_(unit.masked_fill_(ignored[:, None], 0.0))
    if stats is not None:
        p = torch.exp(logp)
        log_other = torch.where(alone, 0.0, torch.nn.functional.logsigmoid(a))
        log_coef = torch.where(alone, 0.0, log_other - sum_other.log())
        spread = log_coef * other + torch.where(alone, 0.0, other / sum_other) * state[4]
        stats[0] = -(torch.where(p == 0.0, 0.0, p * logp) + spread)
        stats[1] = z_target - logp
        stats[2] = torch.where(z_target >= max_other, 1.0, 0.0)
        stats[3] = state[3] / vocab_size
        other_sq = torch.where(alone, -math.inf, 2.0 * log_coef + state[5].log())
        stats[4] = torch.logaddexp(2.0 * logp, other_sq)
        stats.add_(nan).masked_fill_(ignored[None], 0.0)


def _log_probs(z: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities, in the place of logits, and probabilities."""
    z -= torch.where(state[0] == -math.inf, 0.0, state[0])[:, None]
    p = z.exp().div_(state[1, :, None])
    return z.sub_(state[1].log()[:, None]), p


def kl_tile_(
    tile: Tensor,
    ref_tile: Tensor,
    out: Tensor | None,
    state: Tensor,
    ref_state: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    scale: float,
    softcap: float,
    ref_scale: float,
    ref_softcap: float,
    kl: Tensor,
) -> None:
    """See :func:`fastpref.backends.RowKernels.kl_tile_`."""
    shared = torch.minimum(state[1], ref_state[1])
    log_r, r = _log_probs(_logits_(ref_tile.clone(), ref_bias, ref_scale, ref_softcap), ref_state)
    z = _logits_(tile.clone(), bias, scale, softcap)
    slope = ((softcap - z) / softcap) * ((softcap + z) / softcap) if softcap > 0.0 else None
    log_p, p = _log_probs(z, state)
    kl.add_(torch.where(r == 0.0, 0.0, r * (log_r - log_p)).sum(1))
    if out is not None:
        gradient = (p - r).mul_(shared[:, None])
        out.copy_(gradient if slope is None else gradient.mul_(slope))


def scale_rows_(out: Tensor, x: Tensor, factor: Tensor) -> None:
    """See :func:`fastpref.backends.RowKernels.scale_rows_`."""
    out.copy_((x * factor[:, None]).masked_fill_((factor == 0.0)[:, None], 0.0))


def add_target_rows_(out: Tensor, x: Tensor, targets: Tensor, factor: Tensor, start: int) -> None:
    """See :func:`fastpref.backends.RowKernels.add_target_rows_`."""
    local = targets - start
    hit = (local >= 0) & (local < out.shape[0])
    rows = torch.empty(x.shape, dtype=out.dtype, device=x.device)
    scale_rows_(rows, x, torch.where(hit, factor, 0.0))
    # index_put_ sorts on CUDA: deterministic where index_add_ is not
    out.index_put_((local.clamp(0, out.shape[0] - 1),), rows, accumulate=True)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """See :func:`fastpref.backends.RowKernels.segment_sum`."""
    if cu_seqlens.numel() == 1:
        return values.new_zeros(0)
    total = torch.segment_reduce(
        values.double(), "sum", offsets=cu_seqlens.long(), initial=0.0, unsafe=True
    )
    return total.to(values.dtype)


def segment_sum_backward(grad: Tensor, cu_seqlens: Tensor, n: int) -> Tensor:
    """See :func:`fastpref.backends.RowKernels.segment_sum_backward`."""
    position = torch.arange(n, device=grad.device, dtype=cu_seqlens.dtype)
    owner = torch.searchsorted(cu_seqlens, position, right=True) - 1
    covered = (owner >= 0) & (owner < grad.numel())
    if not grad.numel():
        return grad.new_zeros(n)
    return grad[owner.clamp(0, grad.numel() - 1)].masked_fill(~covered, 0.0)


def pair_margins(logps: Tensor, ref_logps: Tensor, cu_seqlens: Tensor, pairs: Tensor) -> Tensor:
    """See :func:`fastpref.backends.RowKernels.pair_margins`."""
    ratios = segment_sum(logps.double() - ref_logps.double(), cu_seqlens)
    chosen, rejected = ratios[pairs[:, 0]], ratios[pairs[:, 1]]
    return torch.stack([chosen - rejected, chosen, rejected]).to(logps.dtype)


def pair_margins_backward(grad: Tensor, cu_seqlens: Tensor, pairs: Tensor, n: int) -> Tensor:
    """See :func:`fastpref.backends.RowKernels.pair_margins_backward`."""
    of_sequence = torch.zeros(cu_seqlens.numel() - 1, dtype=torch.float64, device=grad.device)
    values = torch.cat([grad[0].double() + grad[1].double(), grad[2].double() - grad[0].double()])
    of_sequence.index_put_((torch.cat([pairs[:, 0], pairs[:, 1]]),), values, accumulate=True)
    return segment_sum_backward(of_sequence, cu_seqlens, n).to(grad.dtype)
