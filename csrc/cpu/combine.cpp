// combine_: log-probabilities, gradient factors, statistics and dlogp/dhidden of finished rows.
#include "../row_math.h"
#include "rows.h"

namespace fastpref {
namespace {

template <class c>
struct Outputs {
  c *logp, *q, *coef;
  Matrix stats;

  void write(int64_t i, const Finished<c>& f) const {
    logp[i] = f.logp, q[i] = f.q, coef[i] = f.coef;
    if (!stats) return;
    const c values[5] = {f.entropy, f.lse, f.top1, f.logit_mean, f.log_sum_sq_probs};
    for (int k = 0; k < 5; ++k) static_cast<c*>(stats.at(k))[i] = values[k];
  }
};

template <class c>
void run(const Matrix& state, const int64_t* targets, int64_t vocab_size, c softcap, c scale,
         const Matrix& acc, const Matrix& weight, const Matrix& hidden_grad,
         const Outputs<c>& out) {
  const int64_t width = hidden_grad ? hidden_grad.cols : 0;
  const c* s[6];
  for (int k = 0; k < 6; ++k) s[k] = static_cast<const c*>(state.at(k));
  parallel(state.cols, width + 64, [&](int64_t first, int64_t last) {
    const Buffer<c> buffer(width);
    c* row = buffer.get();
    for (int64_t i = first; i < last; ++i) {
      const int64_t y = targets[i];
      Finished<c> f{};
      if (y >= 0) {
        f = finish(Row<c>{s[0][i], s[1][i], s[2][i], s[3][i], s[4][i], s[5][i]}, vocab_size,
                   softcap);
      }
      out.write(i, f);
      if (!hidden_grad) continue;
      if (y < 0 || y >= weight.rows) {
        std::fill_n(row, width, y < 0 ? c(0) : std::numeric_limits<c>::quiet_NaN());
      } else {
        const c* w = load_row(weight.at(y), weight.dtype, row, width);
        gradient_row(row, w, static_cast<const c*>(acc.at(i)), scale, f.q, f.coef, width);
      }
      store_row(hidden_grad.at(i), hidden_grad.dtype, row, width);
    }
  });
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
  with_compute_type(s.dtype, [&](auto zero) {
    using c = decltype(zero);
    const Outputs<c> out{vector<c>(logp, "logp", n), vector<c>(q, "q", n),
                         vector<c>(coef, "coef", n), st};
    run<c>(s, y, vocab_size, c(softcap), c(scale), a, w, h, out);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CPU, m) { m.impl("combine_", TORCH_BOX(&combine)); }

}  // namespace fastpref
