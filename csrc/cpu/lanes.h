// Parts of a row of logits that the sweep and the KL share: 64 lanes at a time, in buffers that are
// padded to whole blocks of lanes, so that no inner loop has a branch or a tail.
#pragma once

#include "../row_math.h"
#include "rows.h"

namespace fastpref {

inline constexpr int64_t kLanes = 64;  // partial sums: exact enough, and wide enough for any ISA

constexpr int64_t padded_to_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// How the raw dot products of a row become logits.
template <class c>
struct ToLogits {
  const c* bias;  // of the first column, or none
  c scale, softcap;

  ToLogits from(int64_t column) const {
    return {bias != nullptr ? bias + column : nullptr, scale, softcap};
  }
};

template <class c>
FASTPREF_INLINE c reduce_sum(c* lane) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

template <class c, bool kCapped>
FASTPREF_INLINE void logits(c* z, const c* x, int64_t width, const ToLogits<c>& to) {
  const c scale = to.scale, cap = to.softcap, inverse = kCapped ? c(1) / cap : c(0);
  const c* bias = to.bias;
  if (bias != nullptr) {
    for (int64_t j = 0; j < width; ++j)
      z[j] = logit<c, kCapped>(x[j], bias[j], scale, cap, inverse);
  } else {
    for (int64_t j = 0; j < width; ++j) z[j] = logit<c, kCapped>(x[j], c(0), scale, cap, inverse);
  }
}

// z times the slope of the cap; 0 stays 0 where the slope is not a number.
template <class c>
FASTPREF_INLINE void times_slope(c* z, const c* x, int64_t width, const ToLogits<c>& to) {
  for (int64_t j = 0; j < width; ++j) {
    const c b = to.bias != nullptr ? to.bias[j] : c(0);
    z[j] = weigh(z[j], cap_slope_of_raw(to.scale * (x[j] + b), to.softcap));
  }
}

}  // namespace fastpref
