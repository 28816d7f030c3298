"""Sums over the segments of a packed token axis, pair margins, and the gradients of both.

``cu_seqlens (S + 1,)`` int32 bounds S segments of n tokens. Sums are accumulated in float64: a
sequence's log-probability is a difference of large sums, and 8 bytes a lane cost nothing here.
"""

import triton
import triton.language as tl


@triton.jit
def _bounds(cu_seqlens, segment, exists):
    """First token of a segment and the one after its last; both 0 for one that does not exist."""
    first = tl.load(cu_seqlens + segment, mask=exists, other=0).to(tl.int64)
    return first, tl.load(cu_seqlens + segment + 1, mask=exists, other=0).to(tl.int64)


@triton.jit
def _sum_segment(values, ref_values, first, end, n, BLOCK: tl.constexpr):
    """float64 sum over [first, end) of ``values``, less ``ref_values`` where given.

    NaN if the segment reaches outside the n tokens, instead of a read out of bounds.
    """
    total = tl.zeros([BLOCK], dtype=tl.float64)
    while first < end:
        at = first + tl.arange(0, BLOCK)
        mine = at < end
        readable = mine & (at >= 0) & (at < n)
        x = tl.load(values + at, mask=readable, other=float("nan")).to(tl.float64)
        if ref_values is not None:
            x -= tl.load(ref_values + at, mask=readable, other=0.0).to(tl.float64)
        total += tl.where(mine, x, 0.0)
        first += BLOCK
    return tl.sum(total, 0)


@triton.jit
def _fill(out, first, end, n, value, BLOCK: tl.constexpr):
    """Writes ``value`` to [first, end), as far as that lies in [0, n)."""
    first = tl.maximum(first, 0)
    end = tl.minimum(end, n)
    while first < end:
        at = first + tl.arange(0, BLOCK)
        tl.store(out + at, tl.zeros([BLOCK], out.dtype.element_ty) + value, mask=at < end)
        first += BLOCK


@triton.jit
def _fill_outside(out, cu_seqlens, num_segments, n, BLOCK: tl.constexpr):
    """Writes 0 to the tokens before the first segment and after the last."""
    _fill(out, tl.zeros_like(n), tl.load(cu_seqlens).to(tl.int64), n, 0.0, BLOCK)
    _fill(out, tl.load(cu_seqlens + num_segments).to(tl.int64), n, n, 0.0, BLOCK)


@triton.jit(do_not_specialize=["n"])
def segment_sum_kernel(values, cu_seqlens, out, n: tl.int64, BLOCK: tl.constexpr):
    """Sum of a segment, one program a segment: reads its tokens once, writes one number."""
    segment = tl.program_id(0)
    first, end = _bounds(cu_seqlens, segment, True)
    total = _sum_segment(values, None, first, end, n, BLOCK)
    tl.store(out + segment, total.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["num_segments", "n"])
def segment_sum_backward_kernel(
    grad, cu_seqlens, out, num_segments, n: tl.int64, BLOCK: tl.constexpr
):
    """A segment's gradient on each of its tokens, one program a segment; one more writes the zeros
    outside every segment. Reads one number a segment, writes each token once.
    """
    segment = tl.program_id(0)
    if segment == num_segments:
        _fill_outside(out, cu_seqlens, num_segments, n, BLOCK)
    else:
        first, end = _bounds(cu_seqlens, segment, True)
        _fill(out, first, end, n, tl.load(grad + segment), BLOCK)


@triton.jit
def _log_ratio(logps, ref_logps, cu_seqlens, sequence, num_segments, n, BLOCK: tl.constexpr):
    """Sum of ``logps - ref_logps`` over a sequence; NaN for one that does not exist."""
    exists = (sequence >= 0) & (sequence < num_segments)
    first, end = _bounds(cu_seqlens, sequence, exists)
    total = _sum_segment(logps, ref_logps, first, end, n, BLOCK)
    return tl.where(exists, total, float("nan"))


@triton.jit(do_not_specialize=["num_segments", "num_pairs", "n"])
def pair_margins_kernel(
    logps,
    ref_logps,
    cu_seqlens,
    pairs,
    out,
    num_segments,
    num_pairs: tl.int64,
    n: tl.int64,
    BLOCK: tl.constexpr,
):
    """Margin, chosen and rejected log-ratio of a pair, one program a pair.

    Reads the tokens of both sequences and of their reference once, writes three numbers. The
    difference is taken before rounding, so equal log-probabilities give a margin of exactly 0.
    """
    pair = tl.program_id(0).to(tl.int64)
    first = tl.load(pairs + 2 * pair)
    second = tl.load(pairs + 2 * pair + 1)
    chosen = _log_ratio(logps, ref_logps, cu_seqlens, first, num_segments, n, BLOCK)
    rejected = _log_ratio(logps, ref_logps, cu_seqlens, second, num_segments, n, BLOCK)
    dtype = out.dtype.element_ty
    tl.store(out + pair, (chosen - rejected).to(dtype))
    tl.store(out + num_pairs + pair, chosen.to(dtype))
    tl.store(out + 2 * num_pairs + pair, rejected.to(dtype))


@triton.jit(do_not_specialize=["num_segments", "num_pairs", "n"])
def pair_margins_backward_kernel(
    grad,
    cu_seqlens,
    pairs,
    out,
    num_segments,
    num_pairs: tl.int64,
    n: tl.int64,
    BLOCK: tl.constexpr,
):
    """Gradient on each token, one program a sequence; one more writes the zeros outside them all.

    A program looks through all pairs for its sequence, in order, in float64, and writes its tokens
    once: a sequence may sit in any number of pairs, and nothing is added by atomics. That is S P
    comparisons, a million for 1,024 pairs of 2,048 sequences: far less than a launch costs.
    """
    segment = tl.program_id(0)
    if segment == num_segments:
        _fill_outside(out, cu_seqlens, num_segments, n, BLOCK)
    else:
        total = tl.zeros([BLOCK], dtype=tl.float64)
        pair = tl.zeros_like(num_pairs)
        while pair < num_pairs:
            at = pair + tl.arange(0, BLOCK)
            inside = at < num_pairs
            chosen = tl.load(pairs + 2 * at, mask=inside, other=-1) == segment
            rejected = tl.load(pairs + 2 * at + 1, mask=inside, other=-1) == segment
            margin = tl.load(grad + at, mask=chosen | rejected, other=0.0).to(tl.float64)
            plus = tl.load(grad + num_pairs + at, mask=chosen, other=0.0).to(tl.float64)
            minus = tl.load(grad + 2 * num_pairs + at, mask=rejected, other=0.0).to(tl.float64)
            total += tl.where(chosen, margin + plus, 0.0)
            total += tl.where(rejected, minus - margin, 0.0)
            pair += BLOCK
        first, end = _bounds(cu_seqlens, segment, True)
        value = tl.sum(total, 0).to(out.dtype.element_ty)
        _fill(out, first, end, n, value, BLOCK)
