// combine_: log-probabilities, gradient factors, statistics and dlogp/dhidden of finished rows.
#include "device.h"
#include "launch.h"

namespace fastpref {
namespace {

template <class c>
struct Combine {
  Matrix state, acc, weight, hidden_grad, stats;
  const int64_t* targets;
  int64_t vocab_size;
  c softcap, scale;
  c *logp, *q, *coef;
};

// combine_, as RowKernels.combine_ in fastpref/backends/__init__.py defines it.
//
// One thread block: one row. Every thread finishes the row for itself, which costs less than a
// barrier; then the threads share the columns of hidden_grad.
// Bytes: n * (H * (sizeof(c) + sizeof(weight)) read + H * sizeof(hidden_grad) written), and a few
// numbers a row.
// Why this shape: rows of weight are gathered, so a row is the unit; two vectors a thread at
// H = 4,096 keep many loads in flight.
template <class c>
__global__ void __launch_bounds__(kRowThreads) combine_kernel(const Combine<c> a) {
  const int64_t i = blockIdx.x, y = a.targets[i];
  const auto state = [&](int k) { return *static_cast<const c*>(a.state.at(k, i)); };
  Finished<c> f{};
  if (y >= 0) {
    const Row<c> row{state(0), state(1), state(2), state(3), state(4), state(5)};
    f = finish(row, a.vocab_size, a.softcap);
  }
  if (threadIdx.x == 0) {
    a.logp[i] = f.logp, a.q[i] = f.q, a.coef[i] = f.coef;
    if (a.stats) {
      const c values[5] = {f.entropy, f.lse, f.top1, f.logit_mean, f.log_sum_sq_probs};
      for (int k = 0; k < 5; ++k) static_cast<c*>(a.stats.at(k))[i] = values[k];
    }
  }
  const bool inside = y >= 0 && y < a.weight.rows;
  for (int64_t col = threadIdx.x * kRowLane; col < a.hidden_grad.cols;
       col += blockDim.x * kRowLane) {
    c gradient[kRowLane], weight[kRowLane], acc[kRowLane];
    if (inside) {
      load(weight, a.weight, y, col);
      load(acc, static_cast<const c*>(a.acc.at(i, col)), static_cast<int>(a.acc.cols - col));
    }
#pragma unroll
    for (int e = 0; e < kRowLane; ++e) {
      const c outside = y < 0 ? c(0) : std::numeric_limits<c>::quiet_NaN();
      gradient[e] = inside ? hidden_gradient(weight[e], acc[e], a.scale, f.q, f.coef) : outside;
    }
    store(a.hidden_grad, i, col, gradient);
  }
}

void combine(const Tensor& state, const Tensor& targets, int64_t vocab_size, double softcap,
             double scale, const OptionalTensor& acc, const Tensor& weight,
             const OptionalTensor& hidden_grad, const Tensor& logp, const Tensor& q,
             const Tensor& coef, const OptionalTensor& stats) {
  const int64_t n = state.size(1), width = weight.size(1);
  const Matrix s = matrix(state, "state", 6, n), a = matrix(acc, "acc", n, width);
  const Matrix w = matrix(weight, "weight", weight.size(0), width);
  const Matrix h = matrix(hidden_grad, "hidden_grad", n, width);
  const Matrix st = matrix(stats, "stats", 5, n);
  const int64_t* y = vector<int64_t>(targets, "targets", n);
  STD_TORCH_CHECK(!h || a || n == 0, "hidden_grad: needs acc");
  STD_TORCH_CHECK((!a || a.dtype == s.dtype) && (!st || st.dtype == s.dtype),
                  "acc and stats: must have the dtype of state");
  if (n == 0) return;
  const Launch launch(state, targets, acc, weight, hidden_grad, logp, q, coef, stats);
  with_compute_type(s.dtype, [&](auto zero) {
    using c = decltype(zero);
    const Combine<c> arguments{s,
                               a,
                               w,
                               h,
                               st,
                               y,
                               vocab_size,
                               c(softcap),
                               c(scale),
                               vector<c>(logp, "logp", n),
                               vector<c>(q, "q", n),
                               vector<c>(coef, "coef", n)};
    launch(combine_kernel<c>, n, row_threads(h.cols), 0, arguments);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CUDA, m) { m.impl("combine_", TORCH_BOX(&combine)); }

}  // namespace fastpref
