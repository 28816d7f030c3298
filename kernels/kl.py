"""KL(reference || policy) of a tile's rows, and its gradient in the policy's logits."""

import triton
import triton.language as tl

from .numerics import cap_slope, exp_nonpositive, logit, weigh


@triton.jit
def _exponents(model, at, WIDTH: tl.constexpr, CAPPED: tl.constexpr):
    """Logits of the columns ``at``, and what they are above the row's maximum; -inf past the
    end."""
    tile, bias, shift, scale, softcap = model
    inside = at < WIDTH
    b = 0.0
    if bias is not None:
        b = tl.load(bias + at, mask=inside, other=0.0)
    x = tl.load(tile + at, mask=inside, other=0.0)
    z = logit(x, b, scale, softcap, bias is not None, CAPPED)
    return z, tl.where(inside, z - shift, float("-inf"))


@triton.jit(
    do_not_specialize=["state_stride", "ref_state_stride"],
    do_not_specialize_on_alignment=["state", "ref_state", "kl"],
)
def kl_tile_kernel(
    tile,
    ref_tile,
    out,
    state,
    ref_state,
    bias,
    ref_bias,
    kl,
    tile_stride: tl.int64,
    ref_tile_stride: tl.int64,
    out_stride: tl.int64,
    state_stride: tl.int64,
    ref_state_stride: tl.int64,
    scale: tl.float64,
    softcap: tl.float64,
    ref_scale: tl.float64,
    ref_softcap: tl.float64,
    WIDTH: tl.constexpr,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add ``sum_v r_v (log r_v - log p_v)`` to ``kl`` and store ``S (p_v - r_v) d_v``, one program
    a row.

    ``S = min(R, R_ref)``, so that what is stored is at most 1. Traffic of a row: ``8 WIDTH`` bytes
    read (fp32), ``WIDTH * out.itemsize`` written, and a few numbers.

    Shape: nothing is carried along a row but a lane's sum, so the loads of a row overlap, 16 bytes
    a thread at a time. ``out`` may be ``tile``: a chunk is read before it is stored.
    """
    row = tl.program_id(0).to(tl.int64)
    top, top_ref = tl.load(state + row), tl.load(ref_state + row)
    total = tl.load(state + state_stride + row)
    total_ref = tl.load(ref_state + ref_state_stride + row)
    shift = tl.where(top == float("-inf"), 0.0, top)
    shift_ref = tl.where(top_ref == float("-inf"), 0.0, top_ref)
    log_sum, log_sum_ref = tl.log(total), tl.log(total_ref)
    shared = tl.where(total_ref < total, total_ref, total)
    factor, factor_ref = shared / total, shared / total_ref
    policy = (tile + row * tile_stride, bias, shift, scale, softcap)
    reference = (ref_tile + row * ref_tile_stride, ref_bias, shift_ref, ref_scale, ref_softcap)
    if out is not None:
        out += row * out_stride
    sums = tl.zeros([CHUNK], total.dtype)
    for first in tl.range(0, WIDTH, CHUNK):
        at = first + tl.arange(0, CHUNK)
        z, above = _exponents(policy, at, WIDTH, CAPPED)
        _, above_ref = _exponents(reference, at, WIDTH, REF_CAPPED)
        p, r = factor * exp_nonpositive(above), factor_ref * exp_nonpositive(above_ref)
        sums += weigh(r, (above_ref - log_sum_ref) - (above - log_sum))
        if out is not None:
            gradient = p - r
            if CAPPED:
                gradient = weigh(gradient, cap_slope(z, softcap))
            tl.store(out + at, gradient.to(out.dtype.element_ty), mask=at < WIDTH)
    tl.store(kl + row, tl.load(kl + row) + tl.sum(sums, 0) / shared)
