"""Kernels over the rows of an N x H matrix: scaling them, and adding them up by target."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["factor"])
def scale_rows_kernel(
    out,
    x,
    factor,
    out_stride: tl.int64,
    x_stride: tl.int64,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """``out[i] = factor[i] * x[i]``, exactly 0 where the factor is 0; one program a block of a row.

    Traffic of a row: ``HIDDEN (x.itemsize + out.itemsize)`` bytes, and no read of x where the
    factor is 0: that is how 0 wins over what x holds there.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    f = tl.load(factor + row)
    end = tl.where(f == 0.0, 0, HIDDEN)
    values = tl.load(x + row * x_stride + at, mask=at < end, other=0.0)
    scaled = (f * values.to(f.dtype)).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + at, scaled, mask=at < HIDDEN)


@triton.jit(do_not_specialize=["n", "start", "width"], do_not_specialize_on_alignment=["factor"])
def add_target_rows_kernel(
    out,
    x,
    sorted_targets,
    order,
    factor,
    out_stride: tl.int64,
    x_stride: tl.int64,
    n: tl.int64,
    start: tl.int64,
    width: tl.int64,
    HIDDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """``out[targets[i] - start] += factor[i] * x[i]``, one program a run of equal targets and a
    block of columns.

    ``order`` sorts the targets, equal ones by row. The program at the first place of a run owns
    that row of out, alone, and adds the run up in order, BLOCK_R rows at a time: no atomics, the
    same bits every time, nothing counted on the host. The programs at later places, and those whose
    target is outside the tile, read two targets and end.

    Traffic: each row of x inside the tile once, each touched row of out read and written once.
    BLOCK_R loads in flight at once keep the one run that a frequent token makes from being a chain
    of latencies.
    """
    place = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    target = tl.load(sorted_targets + place)
    before = tl.load(sorted_targets + place - 1, mask=place > 0, other=-1)
    owns = (target >= start) & (target < start + width) & ((place == 0) | (before != target))
    total = tl.zeros([BLOCK_H], dtype=out.dtype.element_ty)
    run = place
    more = owns
    while more:
        places = run + tl.arange(0, BLOCK_R)
        mine = tl.load(sorted_targets + places, mask=places < n, other=-1) == target
        row = tl.load(order + places, mask=mine, other=0)
        f = tl.load(factor + row, mask=mine, other=0.0)
        mask = (mine & (f != 0.0))[:, None] & (at < HIDDEN)[None, :]
        values = tl.load(x + row[:, None] * x_stride + at[None, :], mask=mask, other=0.0)
        total += tl.sum(f[:, None] * values.to(total.dtype), 0)
        run += BLOCK_R
        more = tl.sum(mine.to(tl.int32), 0) == BLOCK_R
    mask = at < tl.where(owns, HIDDEN, 0)
    out += (tl.where(owns, target - start, 0)) * out_stride
    old = tl.load(out + at, mask=mask, other=0.0)
    tl.store(out + at, old + total, mask=mask)
