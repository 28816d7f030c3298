// Sums over segments of a token vector, and the margins of pairs of them. Accumulated in double, in
// an order that depends on the lengths alone.
#include "device.h"
#include "launch.h"

namespace fastpref {
namespace {

constexpr int kThreads = 256;

// Segment s is [bounds[s], bounds[s + 1]) of a vector of n tokens. The host does not see the
// bounds, so it cannot check them: a segment that is not inside the vector sums to NaN.
struct Segments {
  const int32_t* bounds;
  int64_t count, n;

  Segments(const Tensor& cu_seqlens, int64_t num_tokens)
      : count(cu_seqlens.numel() - 1), n(num_tokens) {
    STD_TORCH_CHECK(count >= 0, "cu_seqlens: expected at least one element");
    bounds = vector<int32_t>(cu_seqlens, "cu_seqlens", count + 1);
  }

  __device__ int64_t bound(int64_t s) const {
    return bounds[s] < 0 ? 0 : bounds[s] > n ? n : bounds[s];
  }
  __device__ bool inside(int64_t s) const {
    return s >= 0 && s < count && 0 <= bounds[s] && bounds[s] <= bounds[s + 1] &&
           bounds[s + 1] <= n;
  }
};

// Sum over the block, given to all its threads. Two barriers.
__device__ __forceinline__ double sum_of_block(double x) {
  __shared__ double partial[1][kWarp], result;
  double total[1] = {x};
  reduce_block(total, partial, Add(), 0.0);
  if (threadIdx.x == 0) result = total[0];
  __syncthreads();
  return result;
}

// Sum of term(i) over segment s, each thread every kThreads-th; NaN if there is no such segment.
template <class F>
__device__ __forceinline__ double sum_segment(const Segments& segments, int64_t s, const F& term) {
  if (!segments.inside(s)) return std::numeric_limits<double>::quiet_NaN();
  double total = 0;
  const int64_t end = segments.bounds[s + 1];
  for (int64_t i = segments.bounds[s] + threadIdx.x; i < end; i += kThreads) total += term(i);
  return sum_of_block(total);
}

// out[i] = value for first <= i < end.
template <class c>
__device__ __forceinline__ void fill(c* out, int64_t first, int64_t end, c value) {
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) out[i] = value;
}

// out[i] = value(s) in segment s. One thread block: one segment; one more writes 0 to the tokens
// before the first and after the last.
template <class c, class F>
__device__ __forceinline__ void spread(c* out, const Segments& segments, const F& value) {
  const int64_t s = blockIdx.x;
  if (s < segments.count) {
    fill(out, segments.bound(s), segments.bound(s + 1), static_cast<c>(value(s)));
  } else {
    fill(out, 0, segments.bound(0), c(0));
    fill(out, segments.bound(segments.count), segments.n, c(0));
  }
}

// out[s] = sum of values over segment s.
//
// One thread block: one segment. Bytes: n * sizeof(c) read.
// Why this shape: a segment is a response, hundreds to thousands of tokens.
template <class c>
__global__ void __launch_bounds__(kThreads)
    segment_sum_kernel(const Segments segments, const c* values, c* out) {
  const double total =
      sum_segment(segments, blockIdx.x, [&](int64_t i) { return double(values[i]); });
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<c>(total);
}

// out[i] = grad[s] for the tokens of segment s, 0 outside every segment.
//
// One thread block: one segment, see spread. Bytes: n * sizeof(c) written.
template <class c>
__global__ void __launch_bounds__(kThreads)
    segment_sum_backward_kernel(const Segments segments, const c* grad, c* out) {
  spread(out, segments, [&](int64_t s) { return grad[s]; });
}

// out (3, P): margin, chosen and rejected log-ratio; NaN where a pair names no sequence.
//
// One thread block: one pair, first its chosen, then its rejected sequence.
// Bytes: 2 * sizeof(c) read per token of a pair.
// Why this shape: margin = chosen - rejected in double, in the pass that reads the tokens.
template <class c>
__global__ void __launch_bounds__(kThreads)
    pair_margins_kernel(const Segments segments, const c* logps, const c* ref_logps,
                        const int64_t* pairs, int64_t num_pairs, c* out) {
  const int64_t p = blockIdx.x;
  const auto ratio = [&](int64_t s) {
    return sum_segment(segments, s,
                       [&](int64_t i) { return double(logps[i]) - double(ref_logps[i]); });
  };
  const double chosen = ratio(pairs[2 * p]), rejected = ratio(pairs[2 * p + 1]);
  if (threadIdx.x > 0) return;
  out[p] = static_cast<c>(chosen - rejected);
  out[num_pairs + p] = static_cast<c>(chosen);
  out[2 * num_pairs + p] = static_cast<c>(rejected);
}

// The gradient of pair_margins in logps, out (n,), from grad (3, P).
//
// One thread block: one segment, see spread. It sums what every pair sends to its sequence.
// Bytes: n * sizeof(c) written; P * 16 read per block, from the cache.
// Why this shape: a sequence has one writer however many pairs share it, so no atomics; batches
// have hundreds of pairs, not thousands.
template <class c>
__global__ void __launch_bounds__(kThreads)
    pair_margins_backward_kernel(const Segments segments, const Matrix grad, const int64_t* pairs,
                                 c* out) {
  spread(out, segments, [&](int64_t s) {
    const auto row = [&](int k, int64_t p) { return double(static_cast<const c*>(grad.at(k))[p]); };
    double total = 0;
    for (int64_t p = threadIdx.x; p < grad.cols; p += kThreads) {
      if (pairs[2 * p] == s) total += row(0, p) + row(1, p);
      if (pairs[2 * p + 1] == s) total += row(2, p) - row(0, p);
    }
    return sum_of_block(total);
  });
}

const int64_t* pair_indices(const Tensor& pairs) {
  STD_TORCH_CHECK(pairs.dim() == 2 && pairs.size(1) == 2 && pairs.is_contiguous() &&
                      pairs.scalar_type() == ScalarType::Long,
                  "pairs: expected contiguous int64 (P, 2)");
  return static_cast<const int64_t*>(pairs.data_ptr());
}

Tensor segment_sum(const Tensor& values, const Tensor& cu_seqlens) {
  const Launch launch(values, cu_seqlens);
  const Segments segments(cu_seqlens, values.numel());
  Tensor out = torch::stable::new_empty(values, {segments.count});
  if (out.numel() == 0) return out;
  with_compute_type(values.scalar_type(), [&](auto zero) {
    using c = decltype(zero);
    launch(segment_sum_kernel<c>, segments.count, kThreads, 0, segments,
           vector<c>(values, "values", segments.n), vector<c>(out, "out", segments.count));
  });
  return out;
}

Tensor segment_sum_backward(const Tensor& grad, const Tensor& cu_seqlens, int64_t n) {
  const Launch launch(grad, cu_seqlens);
  const Segments segments(cu_seqlens, n);
  Tensor out = torch::stable::new_empty(grad, {n});
  if (out.numel() == 0) return out;
  with_compute_type(grad.scalar_type(), [&](auto zero) {
    using c = decltype(zero);
    launch(segment_sum_backward_kernel<c>, segments.count + 1, kThreads, 0, segments,
           vector<c>(grad, "grad", segments.count), vector<c>(out, "out", n));
  });
  return out;
}

Tensor pair_margins(const Tensor& logps, const Tensor& ref_logps, const Tensor& cu_seqlens,
                    const Tensor& pairs) {
  const Launch launch(logps, ref_logps, cu_seqlens, pairs);
  const Segments segments(cu_seqlens, logps.numel());
  const int64_t* pair = pair_indices(pairs);
  const int64_t num_pairs = pairs.size(0);
  Tensor out = torch::stable::new_empty(logps, {3, num_pairs});
  if (out.numel() == 0) return out;
  with_compute_type(logps.scalar_type(), [&](auto zero) {
    using c = decltype(zero);
    launch(pair_margins_kernel<c>, num_pairs, kThreads, 0, segments,
           vector<c>(logps, "logps", segments.n), vector<c>(ref_logps, "ref_logps", segments.n),
           pair, num_pairs, static_cast<c*>(out.data_ptr()));
  });
  return out;
}

Tensor pair_margins_backward(const Tensor& grad, const Tensor& cu_seqlens, const Tensor& pairs,
                             int64_t n) {
  const Launch launch(grad, cu_seqlens, pairs);
  const Segments segments(cu_seqlens, n);
  const int64_t* pair = pair_indices(pairs);
  const Matrix g = matrix(grad, "grad", 3, pairs.size(0));
  Tensor out = torch::stable::new_empty(grad, {n});
  if (out.numel() == 0) return out;
  with_compute_type(g.dtype, [&](auto zero) {
    using c = decltype(zero);
    launch(pair_margins_backward_kernel<c>, segments.count + 1, kThreads, 0, segments, g, pair,
           vector<c>(out, "out", n));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CUDA, m) {
  m.impl("segment_sum", TORCH_BOX(&segment_sum));
  m.impl("segment_sum_backward", TORCH_BOX(&segment_sum_backward));
  m.impl("pair_margins", TORCH_BOX(&pair_margins));
  m.impl("pair_margins_backward", TORCH_BOX(&pair_margins_backward));
}

}  // namespace fastpref
