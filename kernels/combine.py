"""Finishing a row: its running numbers become log-probability, gradient factors and statistics."""

import triton
import triton.language as tl

from .numerics import cap_slope, exp_nonpositive, log1p_unit, weigh


@triton.jit(
    do_not_specialize=["state_stride", "stats_stride", "vocab_size"],
    do_not_specialize_on_alignment=["state", "targets", "logp", "q", "coef", "stats"],
)
def combine_kernel(
    state,
    targets,
    acc,
    weight,
    hidden_grad,
    logp,
    q,
    coef,
    stats,
    state_stride: tl.int64,
    acc_stride: tl.int64,
    weight_stride: tl.int64,
    grad_stride: tl.int64,
    stats_stride: tl.int64,
    vocab_size: tl.int64,
    scale: tl.float64,
    softcap: tl.float64,
    HIDDEN: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Everything a row gives, from ``a = log R + M - z_y``, one program a row.

    ``logp = -softplus(a)``, ``q = sigmoid(a) d_y``, ``coef = sigmoid(a) / R``, and ``dlogp/dhidden
    = scale (q W[y] - coef acc)``, which may take the place of ``acc``.

    Traffic of a row: 20 bytes read (32 with statistics), 12 written (32 with statistics); with the
    gradient ``HIDDEN (4 + weight.itemsize)`` read and ``HIDDEN hidden_grad.itemsize`` written.

    Shape: the handful of scalars is cheap enough that every thread of the program works them out
    rather than one kernel leaving them for the next.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    counts = target >= 0
    state += row
    max_other = tl.load(state)
    total = tl.load(state + state_stride)
    z_target = tl.load(state + 2 * state_stride)

    log_sum = tl.log(total)
    a = (max_other - z_target) + log_sum
    # log_softmax of an infinite logit is NaN, never a certainty
    a = tl.where(z_target == float("inf"), float("nan"), a)
    e = exp_nonpositive(-tl.abs(a))
    tail = log1p_unit(e)
    b_logp = 0.0 - (tl.where(a > 0.0, a, 0.0) + tail)
    p = tl.where(a > 0.0, e, 1.0) / (1.0 + e)
    other = tl.where(a > 0.0, 1.0, e) / (1.0 + e)
    b_q = other
    if CAPPED:
        b_q *= cap_slope(z_target, softcap)
    b_coef = tl.where(other == 0.0, 0.0, other / total)
    b_logp = tl.where(counts, b_logp, 0.0)
    b_q = tl.where(counts, b_q, 0.0)
    b_coef = tl.where(counts, b_coef, 0.0)
    tl.store(logp + row, b_logp)
    tl.store(q + row, b_q)
    tl.store(coef + row, b_coef)

    if stats is not None:
        stats += row
        log_other = 0.0 - (tl.where(a < 0.0, -a, 0.0) + tail)
        weighted = tl.load(state + 4 * state_stride)
        squares = tl.load(state + 5 * state_stride)
        entropy = weigh(p, b_logp) + weigh(other, log_other - log_sum) + weigh(b_coef, weighted)
        lse = tl.where(a < 0.0, z_target - b_logp, (max_other + log_sum) - log_other)
        top1 = (z_target >= max_other).to(lse.dtype)
        mean = tl.load(state + 3 * state_stride) / vocab_size.to(lse.dtype)
        sum_sq = tl.log(p * p + b_coef * b_coef * squares)
        tl.store(stats, tl.where(counts, 0.0 - entropy, 0.0))
        tl.store(stats + stats_stride, tl.where(counts, lse, 0.0))
        tl.store(stats + 2 * stats_stride, tl.where(counts, top1, 0.0))
        tl.store(stats + 3 * stats_stride, tl.where(counts, mean, 0.0))
        tl.store(stats + 4 * stats_stride, tl.where(counts, sum_sq, 0.0))

    if hidden_grad is not None:
        inside = counts & (target < vocab_size)
        weight += tl.where(inside, target, 0) * weight_stride
        acc += row * acc_stride
        hidden_grad += row * grad_stride
        end = tl.where(counts, HIDDEN, 0)
        for first in tl.range(0, HIDDEN, BLOCK_H):
            at = first + tl.arange(0, BLOCK_H)
            mine = at < end
            toward = tl.load(weight + at, mask=mine, other=0.0).to(b_q.dtype)
            away = tl.load(acc + at, mask=mine, other=0.0)
            unit = tl.cast(scale, b_q.dtype) * (b_q * toward - b_coef * away)
            tl.store(hidden_grad + at, unit.to(hidden_grad.dtype.element_ty), mask=at < HIDDEN)
