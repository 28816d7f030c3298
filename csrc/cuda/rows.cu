// scale_rows_ and add_target_rows_: rows of any float dtype, scaled, in place of or onto others.
#include "device.h"
#include "launch.h"

namespace fastpref {
namespace {

// out[i] = factor[i] * x[i]; exactly 0 for factor 0, and then x is not read.
//
// One thread block: one row.
// Bytes: n * H * (sizeof(x) read + sizeof(out) written).
// Why this shape: a row has one factor; rows of a model's width are one or two vectors a thread.
template <class c>
__global__ void __launch_bounds__(kRowThreads)
    scale_rows_kernel(const Matrix out, const Matrix x, const c* factors) {
  const int64_t i = blockIdx.x;
  const c factor = factors[i];
  for (int64_t col = threadIdx.x * kRowLane; col < out.cols; col += blockDim.x * kRowLane) {
    c values[kRowLane] = {};
    if (factor != c(0)) load(values, x, i, col);
#pragma unroll
    for (int e = 0; e < kRowLane; ++e) values[e] *= factor;
    store(out, i, col, values);
  }
}

// out[targets[i] - start] += factor[i] * x[i] for targets inside out.
//
// One thread block: kRowThreads * kRowLane columns of one row of out, at the first row i with that
// target; a later row with it leaves its work to the first, so every sum has one writer and runs in
// the order of the rows: no atomics, no sorting, no host.
// Bytes: H * sizeof(x) read per row, H * sizeof(c) read and written per distinct target; n * 8 of
// targets per block, from the cache.
// Why this shape: most targets are rare, so most blocks add one row; reading all targets costs them
// less than a sort would. Four blocks a multiprocessor leave each thread registers enough.
template <class c>
__global__ void __launch_bounds__(kRowThreads, 4)
    add_target_rows_kernel(const Matrix out, const Matrix x, const int64_t* targets,
                           const c* factors, int64_t start, int64_t column_blocks) {
  __shared__ unsigned found[kRowThreads / kWarp];
  const int64_t i = blockIdx.x / column_blocks, y = targets[i], row = y - start;
  const int64_t col = (blockIdx.x % column_blocks * blockDim.x + threadIdx.x) * kRowLane;
  if (y < 0 || row < 0 || row >= out.rows) return;
  bool earlier = false;
  for (int64_t j = threadIdx.x; j < i; j += blockDim.x) earlier |= targets[j] == y;
  if (__syncthreads_or(earlier)) return;
  c* const to = static_cast<c*>(out.at(row, col));
  c total[kRowLane];
  load(total, to, static_cast<int>(out.cols - col));
  for (int64_t base = i; base < x.rows; base += blockDim.x) {
    const int64_t j = base + threadIdx.x;
    const bool same = j < x.rows && targets[j] == y;
    if (!__syncthreads_or(same)) continue;
    const unsigned lanes = __ballot_sync(kAllLanes, same);
    if (threadIdx.x % kWarp == 0) found[threadIdx.x / kWarp] = lanes;
    __syncthreads();
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
      for (unsigned left = found[w]; left != 0; left &= left - 1) {
        const int64_t source = base + w * kWarp + __ffs(left) - 1;
        const c factor = factors[source];
        if (factor == c(0)) continue;
        c values[kRowLane];
        load(values, x, source, col);
#pragma unroll
        for (int e = 0; e < kRowLane; ++e) total[e] += factor * values[e];
      }
    }
  }
  store(to, total, static_cast<int>(out.cols - col));
}

void scale_rows(const Tensor& out, const Tensor& x, const Tensor& factor) {
  const int64_t n = out.size(0), width = out.size(1);
  const Matrix to = matrix(out, "out", n, width), from = matrix(x, "x", n, width);
  if (out.numel() == 0) return;
  const Launch launch(out, x, factor);
  with_compute_type(factor.scalar_type(), [&](auto zero) {
    using c = decltype(zero);
    launch(scale_rows_kernel<c>, n, row_threads(width), 0, to, from,
           vector<c>(factor, "factor", n));
  });
}

void add_target_rows(const Tensor& out, const Tensor& x, const Tensor& targets,
                     const Tensor& factor, int64_t start) {
  const int64_t n = x.size(0), width = x.size(1);
  const Matrix to = matrix(out, "out", out.size(0), width), from = matrix(x, "x", n, width);
  const int64_t* y = vector<int64_t>(targets, "targets", n);
  if (x.numel() == 0) return;
  const Launch launch(out, x, targets, factor);
  with_compute_type(to.dtype, [&](auto zero) {
    using c = decltype(zero);
    const int threads = row_threads(width);
    const int64_t column_blocks = ceil_div(width, int64_t{threads} * kRowLane);
    launch(add_target_rows_kernel<c>, n * column_blocks, threads, 0, to, from, y,
           vector<c>(factor, "factor", n), start, column_blocks);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CUDA, m) {
  m.impl("scale_rows_", TORCH_BOX(&scale_rows));
  m.impl("add_target_rows_", TORCH_BOX(&add_target_rows));
}

}  // namespace fastpref
