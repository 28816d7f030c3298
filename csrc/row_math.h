// The arithmetic of the row kernels, for one logit or one row. Included by the C++ and the CUDA
// kernels alike, so that tests on a CPU exercise what a GPU runs. No loops, no memory, no torch.
//
// Notation, as in fastpref/backends/__init__.py: z is a logit after bias, scale and softcap; y the
// target's column; M the maximum of the other z; E = exp(z - M) <= 1; R the sum of the other E.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define FASTPREF_INLINE __host__ __device__ __forceinline__
#else
#define FASTPREF_INLINE inline __attribute__((always_inline))
#endif

namespace fastpref {

template <class c>
struct Float;

template <>
struct Float<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127, kLift = 64, kDegree = 7;
  static constexpr float kLowest = -104.0f;   // its exp rounds to 0
  static constexpr float kRound = 0x1.8p23f;  // x + it - it is an integer
  static constexpr float kLn2Hi = 0x1.62e4p-1f, kLn2Lo = 0x1.7f7d1cp-20f;  // n * kLn2Hi is exact
};

template <>
struct Float<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023, kLift = 128, kDegree = 13;
  static constexpr double kLowest = -746.0;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2Hi = 0x1.62e42feep-1, kLn2Lo = 0x1.a39ef35793c76p-33;
};

template <class To, class From>
FASTPREF_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class c>
FASTPREF_INLINE constexpr c inverse_factorial(int k) {
  double product = 1;
  for (int i = 2; i <= k; ++i) product *= i;
  return c(1 / product);
}

// 1/k! + r / (k+1)! + ... up to the degree that leaves less than half an ulp for |r| <= log(2) / 2.
template <class c, int k>
FASTPREF_INLINE c exp_series(c r) {
  constexpr c kTerm = inverse_factorial<c>(k);
  if constexpr (k == Float<c>::kDegree) {
    return kTerm;
  } else {
    return r * exp_series<c, k + 1>(r) + kTerm;
  }
}

// exp(x) = (1 + fraction) * power * 2^-kLift. The lift keeps the power of two a normal number where
// exp(x) is a denormal, so that the last multiplication rounds once.
template <class c>
struct SplitExp {
  c fraction, power;
};

// For x in [kLowest, 0], or NaN. No branch and no call: this vectorises.
template <class c>
FASTPREF_INLINE SplitExp<c> split_exp(c x) {
  using F = Float<c>;
  using Bits = typename F::Bits;
  const c rounded = x * c(1.44269504088896340736) + F::kRound;
  const c n = rounded - F::kRound;
  const c r = (x - n * F::kLn2Hi) - n * F::kLn2Lo;
  const Bits exponent = bit_cast<Bits>(rounded) - bit_cast<Bits>(F::kRound) + F::kBias + F::kLift;
  return {r * (r * exp_series<c, 2>(r)) + r, bit_cast<c>(Bits(exponent << F::kMantissa))};
}

template <class c>
FASTPREF_INLINE constexpr c unlift() {
  return c(1) / c(Float<c>::kLift == 64 ? 0x1p64 : 0x1p128);
}

// x, but no lower than the exponent whose exp rounds to 0: finite for -inf, NaN for NaN.
template <class c>
FASTPREF_INLINE c clamp_exponent(c x, c lowest = Float<c>::kLowest) {
  return x < lowest ? lowest : x;
}

// exp(x) for x <= 0 (already clamped) or NaN, within 1 ulp; 0 where exp(x) is a denormal. Next to
// R >= 1 or the 1 of a likely target denormals change no sum, and the products that would read them
// take up to fourteen times as long on a CPU.
template <class c>
FASTPREF_INLINE c exp_clamped(c x) {
  constexpr c kSmallest = std::numeric_limits<c>::min() / unlift<c>();
  const SplitExp<c> e = split_exp(x);
  const c lifted = e.power + e.power * e.fraction;
  return (lifted < kSmallest ? c(0) : lifted) * unlift<c>();
}

template <class c>
FASTPREF_INLINE c exp_nonpositive(c x) {
  return exp_clamped(clamp_exponent(x));
}

// a / b for b in [1, 2], where no case is special. Within 1 ulp on a GPU, whose general division
// branches and takes several times as long.
template <class c>
FASTPREF_INLINE c divide(c a, c b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(c) == sizeof(float)) {
    c reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
    const c quotient = a * reciprocal;
    return quotient + reciprocal * (a - b * quotient);
  }
#endif
  return a / b;
}

// tanh(x) = -expm1(-2|x|) / (2 + expm1(-2|x|)) with the sign of x, within 3 ulp; on a CPU within 1
// where it nears 1, as one minus what is missing, so that 1 - tanh^2 is as good as it can be.
template <class c>
FASTPREF_INLINE c tanh_exact(c x) {
  // long before half the lowest exponent tanh is 1
  const SplitExp<c> e = split_exp(clamp_exponent(c(-2) * std::fabs(x), Float<c>::kLowest / 2));
  const c power = e.power * unlift<c>();
  const c m = power * e.fraction + (power - c(1));
#if defined(__CUDA_ARCH__)
  return std::copysign(divide(-m, c(2) + m), x);
#else
  const c u = power * e.fraction + power;
  const bool near = u < c(0.25);
  const c quotient = (near ? c(2) * u : -m) / (c(2) + m);
  return std::copysign(near ? c(1) - quotient : quotient, x);
#endif
}

// A logit from a raw dot product: bias, scale, and softcap where there is one.
template <class c, bool kCapped>
FASTPREF_INLINE c logit(c x, c bias, c scale, c softcap, c inverse_softcap) {
  const c z = scale * (x + bias);
  return kCapped ? softcap * tanh_exact(z * inverse_softcap) : z;
}

// dz/d(uncapped z) = 1 - (z / softcap)^2, as a product of differences, on a CPU such as are exact
// where they are small: at the cap the slope is 0. On a GPU softcap would be one more number for
// each thread of the sweep to hold.
template <class c>
FASTPREF_INLINE c cap_slope(c z, c softcap) {
  const c inverse = c(1) / softcap;  // out of the caller's loop
#if defined(__CUDA_ARCH__)
  const c t = z * inverse;
  return (c(1) - t) * (c(1) + t);
#else
  return ((softcap - z) * inverse) * ((softcap + z) * inverse);
#endif
}

// The same from z before the cap: 1 / cosh^2, without cancellation, for another exponential.
template <class c>
FASTPREF_INLINE c cap_slope_of_raw(c z, c softcap) {
  const c u = exp_nonpositive(c(-2) * std::fabs(z * (c(1) / softcap)));
  return c(4) * u / ((c(1) + u) * (c(1) + u));
}

// What is known of a row so far: the six rows of `state`.
template <class c>
struct Row {
  c max;       // M
  c sum;       // R
  c target;    // z_y
  c logits;    // sum of z, the target's included
  c weighted;  // sum of E (z - M)
  c squares;   // sum of E^2
};

// The offset to subtract from logits before exp: M, and 0 while no finite logit has been seen.
template <class c>
FASTPREF_INLINE c shift_of(c max) {
  return max == -std::numeric_limits<c>::infinity() ? c(0) : max;
}

// Raises M to `max`, if that is higher, and restates the sums under it. Returns the factor of
// `acc`.
template <class c>
FASTPREF_INLINE c raise_max(Row<c>& row, c max) {
  if (!(max > row.max)) return c(1);
  const c gap = row.max - max;
  const c shrink = exp_nonpositive(gap);
  row.weighted = shrink == c(0) ? c(0) : shrink * (row.weighted + gap * row.sum);
  row.squares *= shrink * shrink;
  row.sum *= shrink;
  row.max = max;
  return shrink;
}

// What a finished row gives. p is the target's probability, 1 - p = other.
template <class c>
struct Finished {
  c logp, q, coef;
  c entropy, lse, top1, logit_mean, log_sum_sq_probs;
};

// p * x where p = 0 wins over an infinite x.
template <class c>
FASTPREF_INLINE c weigh(c p, c x) {
  return p == c(0) ? c(0) : p * x;
}

// Everything from a = log R + M - z_y. R = 0 gives a = -inf, and with it logp = q = coef = 0.
// softcap is 0 where there is no cap.
template <class c>
FASTPREF_INLINE Finished<c> finish(const Row<c>& row, int64_t vocab_size, c softcap) {
  const c log_sum = std::log(row.sum);
  c a = (row.max - row.target) + log_sum;
  // log_softmax of an infinite logit is NaN, never a certainty
  if (row.target == std::numeric_limits<c>::infinity()) a = std::numeric_limits<c>::quiet_NaN();
  const c e = std::exp(-std::fabs(a));
  const c tail = std::log1p(e);
  const c logp = -((a > c(0) ? a : c(0)) + tail);
  const c log_other = -((a < c(0) ? -a : c(0)) + tail);
  const c p = (a > c(0) ? e : c(1)) / (c(1) + e);
  const c other = (a > c(0) ? c(1) : e) / (c(1) + e);
  Finished<c> f;
  f.logp = logp;
  f.q = softcap > c(0) ? other * cap_slope(row.target, softcap) : other;
  f.coef = other == c(0) ? c(0) : other / row.sum;
  f.entropy = -(weigh(p, logp) + weigh(other, log_other - log_sum) + weigh(f.coef, row.weighted));
  f.lse = a < c(0) ? row.target - logp : (row.max + log_sum) - log_other;
  f.top1 = row.target >= row.max ? c(1) : c(0);
  f.logit_mean = row.logits / c(vocab_size);
  f.log_sum_sq_probs = std::log(p * p + f.coef * f.coef * row.squares);
  return f;
}

// One element of dlogp/dhidden.
template <class c>
FASTPREF_INLINE c hidden_gradient(c weight, c acc, c scale, c q, c coef) {
  return scale * (q * weight - coef * acc);
}

}  // namespace fastpref
