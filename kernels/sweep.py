"""The sweep: one tile of raw dot products becomes the operand of the gradient products.

Names: a tile has n rows and WIDTH columns, from vocabulary entry ``start``; z is a logit after
bias, scale and softcap, y the target; M is the maximum of the other logits so far, E = exp(z - M),
R the sum of the other E. ``fastpref.backends.RowKernels`` holds the contract.
"""

import triton
import triton.language as tl

from .numerics import cap_slope, exp_nonpositive, logit


@triton.jit
def _load(line, first, CHUNK: tl.constexpr, CAPPED: tl.constexpr):
    """Logits of the columns from ``first`` on, and which of them are another token's; -inf where
    not.
    """
    tile, bias, column, end, scale, softcap = line
    at = first + tl.arange(0, CHUNK)
    inside = at < end
    b = 0.0
    if bias is not None:
        b = tl.load(bias + at, mask=inside, other=0.0)
    x = tl.load(tile + at, mask=inside, other=0.0)
    others = inside & (at != column)
    z = logit(x, b, scale, softcap, bias is not None, CAPPED)
    return tl.where(others, z, float("-inf")), others


@triton.jit
def _survey(
    seen,
    line,
    first,
    CHUNK: tl.constexpr,
    CAPPED: tl.constexpr,
    WITH_STATS: tl.constexpr,
):
    """First look at a chunk: its logits, and the maximum and the sum so far, lane by lane."""
    highest, logits = seen
    z, others = _load(line, first, CHUNK, CAPPED)
    if WITH_STATS:
        logits += tl.where(others, z, 0.0)
    return z, (tl.maximum(highest, z), logits)


@triton.jit
def _fold(
    sums,
    z,
    base,
    out,
    first,
    softcap,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPPED: tl.constexpr,
    WITH_STATS: tl.constexpr,
):
    """Adds a chunk's E, E (z - M) and E^2 to the sums, lane by lane, and stores its ``E * d``."""
    total, weighted, squares = sums
    gap = z - base
    e = exp_nonpositive(gap)
    total += e
    if WITH_STATS:
        # finite, so that 0 * gap is 0 where the logit is -inf
        weighted += e * tl.where(gap < -1.0e4, -1.0e4, gap)
        squares += e * e
    if out is not None:
        if CAPPED:
            e = tl.where(e == 0.0, 0.0, e * cap_slope(z, softcap))
        at = first + tl.arange(0, CHUNK)
        tl.store(out + at, e.to(out.dtype.element_ty), mask=at < WIDTH)
    return total, weighted, squares


@triton.jit
def _rescale(acc, shrink, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """Multiplies a row of ``acc``, in place."""
    for first in tl.range(0, HIDDEN, BLOCK):
        at = first + tl.arange(0, BLOCK)
        values = tl.load(acc + at, mask=at < HIDDEN)
        tl.store(acc + at, values * shrink, mask=at < HIDDEN)


@triton.jit(
    do_not_specialize=["start", "state_stride"],
    do_not_specialize_on_alignment=["state", "offset", "targets"],
)
def sweep_kernel(
    tile,
    out,
    state,
    offset,
    acc,
    targets,
    bias,
    tile_stride: tl.int64,
    out_stride: tl.int64,
    acc_stride: tl.int64,
    state_stride: tl.int64,
    start: tl.int64,
    scale: tl.float64,
    softcap: tl.float64,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    CAPPED: tl.constexpr,
    WITH_STATS: tl.constexpr,
    CHUNK: tl.constexpr,
    HELD: tl.constexpr,
):
    """Fold a row of the tile into its running numbers and store ``E * d``, one program a row.

    Traffic of a row: reads ``4 WIDTH`` bytes (fp32), writes ``WIDTH * out.itemsize``; 8 bytes of
    target, 8 read and 12 written of state (20 and 24 with statistics); ``8 HIDDEN`` more only where
    M grew, which for T tiles in random order happens about ``log T`` times a row.

    Shape: the row is taken in chunks of CHUNK columns, four to a thread, one 16-byte access.
    HELD rows are loaded once and stay in registers between the maximum and the exponentials, which
    is what makes it one read and one write. A wider row is walked twice, the maximum first: the
    second read finds it in the cache it was just pulled into, where one pass under a running
    maximum would have to read and rewrite all it had stored whenever the maximum grew.

    R is summed lane by lane over the chunks, then over the lanes, and no product is fused into a
    sum by the compiler (the launcher says so): the bits of R depend on WIDTH alone, not on which
    outputs or statistics are asked for, so that a policy and its reference agree exactly.

    WIDTH is a compile-time number, for a held row is a known number of chunks. A model has two of
    them, a full tile and the last.

    ``out`` may be the tile: a program touches its own row only, and reads a chunk, as well as the
    target's logit, before the reduction of the maximum that stands between it and the first store.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    counts = target >= 0
    column = target - start
    hit = counts & (column >= 0) & (column < WIDTH)
    column = tl.where(hit, column, -1).to(tl.int32)
    tile += row * tile_stride
    state += row
    if out is not None:
        out += row * out_stride

    b_target = 0.0
    if bias is not None:
        b_target = tl.load(bias + column, mask=hit, other=0.0)
    x_target = tl.load(tile + column, mask=hit, other=0.0)
    z_target = logit(x_target, b_target, scale, softcap, bias is not None, CAPPED)

    max_old = tl.load(state)
    # an ignored row has no columns to read
    line = (tile, bias, column, tl.where(counts, WIDTH, 0), scale, softcap)
    zeros = tl.zeros([CHUNK], max_old.dtype)
    seen = (zeros + max_old, zeros)
    held = ()
    if HELD:
        for first in tl.static_range(0, WIDTH, CHUNK):
            z, seen = _survey(seen, line, first, CHUNK, CAPPED, WITH_STATS)
            held = held + (z,)  # noqa: RUF005  the compiler knows no starred tuples
    else:
        for first in tl.range(0, WIDTH, CHUNK):
            _, seen = _survey(seen, line, first, CHUNK, CAPPED, WITH_STATS)
    max_new = tl.max(seen[0], 0)
    sum_logits = tl.sum(seen[1], 0)  # here, where it frees registers
    # while no finite logit has been seen, E = exp(-inf - 0) = 0
    base = tl.where(max_new == float("-inf"), 0.0, max_new)

    sums = (zeros, zeros, zeros)
    if HELD:
        for i in tl.static_range(len(held)):
            z = held[i]
            first = i * CHUNK
            sums = _fold(sums, z, base, out, first, softcap, WIDTH, CHUNK, CAPPED, WITH_STATS)
    else:
        for first in tl.range(0, WIDTH, CHUNK):
            z, _ = _load(line, first, CHUNK, CAPPED)
            sums = _fold(sums, z, base, out, first, softcap, WIDTH, CHUNK, CAPPED, WITH_STATS)
    total, weighted, squares = sums

    grew = max_old != max_new
    shrink = tl.where(grew, exp_nonpositive(max_old - base), 1.0)
    sum_old = tl.load(state + state_stride)
    tl.store(state, max_new, mask=counts)
    tl.store(state + state_stride, sum_old * shrink + tl.sum(total, 0), mask=counts)
    tl.store(state + 2 * state_stride, z_target, mask=hit)
    if offset is not None:
        tl.store(offset + row, max_new)
    if WITH_STATS:
        state += 3 * state_stride
        new = tl.load(state) + (sum_logits + tl.where(hit, z_target, 0.0))
        tl.store(state, new, mask=counts)
        # sum E (z - M) under a higher M: every gap grows by the same amount
        state += state_stride
        old = tl.load(state) + tl.where(grew, (max_old - max_new) * sum_old, 0.0)
        new = tl.where(shrink == 0.0, 0.0, shrink * old) + tl.sum(weighted, 0)
        tl.store(state, new, mask=counts)
        state += state_stride
        tl.store(state, shrink * shrink * tl.load(state) + tl.sum(squares, 0), mask=counts)
    if acc is not None:
        if shrink != 1.0:
            # not CHUNK: one range for both would tie the order of the sums to the layout of acc
            _rescale(acc + row * acc_stride, shrink, HIDDEN, 2 * CHUNK)
