"""Device functions shared by the kernels: exponentials and logits, right to rounding in fp32.

Written with the primitives that the compiler and the interpreter both have (no libdevice), for fp32
and fp64. Nothing here touches memory.
"""

import triton
import triton.language as tl


@triton.jit
def exp_nonpositive(x):
    """``exp(x)`` for ``x <= 0``, within 2 ulp in fp32; 0 for -inf, NaN for NaN.

    The hardware's exp2 is good to 2 ulp, but rounding its argument ``x log2(e)`` alone costs
    ``|x|`` ulp, with a bias from the rounded constant. Both are caught by one fma each and
    multiplied back in.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    # exp of -104 rounds to 0; clamped with a comparison so that NaN passes and -inf - -inf cannot
    # appear
    x = tl.where(x < -104.0, -104.0, x)
    high = x * 1.4426950408889634
    low = tl.fma(x, 1.925963033500e-8, tl.fma(x, 1.4426950408889634, -high))
    return tl.exp2(high) * tl.fma(low, 0.6931471805599453, 1.0)


@triton.jit
def log1p_unit(x):
    """``log(1 + x)`` for x in [0, 1]: the logarithm of the rounded sum, corrected by what rounding
    lost.
    """
    rounded = 1.0 + x
    part = rounded - 1.0
    return tl.where(part == 0.0, x, tl.log(rounded) * (x / tl.where(part == 0.0, 1.0, part)))


@triton.jit
def tanh(x):
    """``tanh(x)`` within a few ulp: ``(1 - e) / (1 + e)`` with ``e = exp(-2 |x|)``, and below 1/2,
    where that cancels, Lambert's continued fraction cut after seven terms (off by < 2e-16).
    """
    size = tl.abs(x)
    e = exp_nonpositive(-2.0 * size)
    y = x * x
    near = x * (((y + 378.0) * y + 17325.0) * y + 135135.0)
    near_below = ((28.0 * y + 3150.0) * y + 62370.0) * y + 135135.0
    far = tl.where(x < 0.0, e - 1.0, 1.0 - e)
    small = size < 0.5
    return tl.where(small, near, far) / tl.where(small, near_below, 1.0 + e)


@triton.jit
def logit(x, bias, scale, softcap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """``cap(scale * (x + bias))`` of a dot product x, ``cap(z) = softcap * tanh(z / softcap)``."""
    if HAS_BIAS:
        x += bias
    x *= tl.cast(scale, x.dtype)
    if CAPPED:
        cap = tl.cast(softcap, x.dtype)
        x = cap * tanh(x * (1.0 / cap))
    return x


@triton.jit
def cap_slope(z, softcap):
    """Derivative of the cap at a capped logit: ``1 - (z / softcap)^2`` as a product of differences
    that are exact where they are small, and 0 at the cap.
    """
    cap = tl.cast(softcap, z.dtype)
    inverse = 1.0 / cap
    return ((cap - z) * inverse) * ((cap + z) * inverse)


@triton.jit
def weigh(p, x):
    """``p * x`` where a probability of 0 wins over an infinite x."""
    return tl.where(p == 0.0, 0.0, p * x)
