// Sums over segments of a token vector, and the margins of pairs of them. Accumulated in double, in
// a fixed order.
#include <vector>

#include "rows.h"

namespace fastpref {
namespace {

// Segment s is [bounds[s], bounds[s + 1]) of a vector of n tokens.
struct Segments {
  const int32_t* bounds;
  int64_t count, n;

  Segments(const Tensor& cu_seqlens, int64_t num_tokens)
      : count(cu_seqlens.numel() - 1), n(num_tokens) {
    STD_TORCH_CHECK(count >= 0, "cu_seqlens: expected at least one element");
    bounds = vector<int32_t>(cu_seqlens, "cu_seqlens", count + 1);
    for (int64_t s = 0; s <= count; ++s) {
      STD_TORCH_CHECK(bounds[s] >= (s == 0 ? 0 : bounds[s - 1]) && bounds[s] <= n,
                      "cu_seqlens: expected non-decreasing values in [0, ", n, "], got ", bounds[s],
                      " at ", s);
    }
  }

  int64_t tokens_each() const { return n / std::max<int64_t>(1, count); }

  // out[s] = sum of term(i) over segment s.
  template <class Out, class F>
  void sum(Out* out, const F& term) const {
    parallel(count, tokens_each(), [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        double total = 0;
        for (int64_t i = bounds[s]; i < bounds[s + 1]; ++i) total += term(i);
        out[s] = static_cast<Out>(total);
      }
    });
  }

  // out[i] = value[s] for each token of segment s; 0 outside every segment.
  template <class Out, class In>
  void spread(Out* out, const In* value) const {
    std::fill_n(out, bounds[0], Out(0));
    parallel(count, tokens_each(), [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s)
        std::fill(out + bounds[s], out + bounds[s + 1], static_cast<Out>(value[s]));
    });
    std::fill(out + bounds[count], out + n, Out(0));
  }
};

Tensor segment_sum(const Tensor& values, const Tensor& cu_seqlens) {
  const Segments segments(cu_seqlens, values.numel());
  Tensor out = torch::stable::new_empty(values, {segments.count});
  with_compute_type(values.scalar_type(), [&](auto zero) {
    using c = decltype(zero);
    const c* value = vector<c>(values, "values", segments.n);
    segments.sum(vector<c>(out, "out", segments.count), [&](int64_t i) { return value[i]; });
  });
  return out;
}

Tensor segment_sum_backward(const Tensor& grad, const Tensor& cu_seqlens, int64_t n) {
  const Segments segments(cu_seqlens, n);
  Tensor out = torch::stable::new_empty(grad, {n});
  with_compute_type(grad.scalar_type(), [&](auto zero) {
    using c = decltype(zero);
    segments.spread(vector<c>(out, "out", n), vector<c>(grad, "grad", segments.count));
  });
  return out;
}

// The sequence that `side` (0 chosen, 1 rejected) of pair p names.
class Pairs {
 public:
  Pairs(const Tensor& pairs, int64_t num_sequences) : count(pairs.size(0)) {
    STD_TORCH_CHECK(pairs.dim() == 2 && pairs.size(1) == 2 && pairs.is_contiguous() &&
                        pairs.scalar_type() == ScalarType::Long,
                    "pairs: expected contiguous int64 (P, 2)");
    data_ = static_cast<const int64_t*>(pairs.data_ptr());
    for (int64_t k = 0; k < 2 * count; ++k) {
      STD_TORCH_CHECK(data_[k] >= 0 && data_[k] < num_sequences, "pairs: expected indices in [0, ",
                      num_sequences, "), got ", data_[k]);
    }
  }
  int64_t operator()(int64_t p, int side) const { return data_[2 * p + side]; }
  const int64_t count;

 private:
  const int64_t* data_;
};

Tensor pair_margins(const Tensor& logps, const Tensor& ref_logps, const Tensor& cu_seqlens,
                    const Tensor& pairs) {
  const Segments segments(cu_seqlens, logps.numel());
  const Pairs pair(pairs, segments.count);
  Tensor out = torch::stable::new_empty(logps, {3, pair.count});
  std::vector<double> ratio(segments.count);
  with_compute_type(logps.scalar_type(), [&](auto zero) {
    using c = decltype(zero);
    const c* policy = vector<c>(logps, "logps", segments.n);
    const c* reference = vector<c>(ref_logps, "ref_logps", segments.n);
    segments.sum(ratio.data(), [&](int64_t i) { return double(policy[i]) - double(reference[i]); });
    c* margin = static_cast<c*>(out.data_ptr());
    for (int64_t p = 0; p < pair.count; ++p) {
      const double chosen = ratio[pair(p, 0)], rejected = ratio[pair(p, 1)];
      margin[p] = c(chosen - rejected);
      margin[pair.count + p] = c(chosen);
      margin[2 * pair.count + p] = c(rejected);
    }
  });
  return out;
}

Tensor pair_margins_backward(const Tensor& grad, const Tensor& cu_seqlens, const Tensor& pairs,
                             int64_t n) {
  const Segments segments(cu_seqlens, n);
  const Pairs pair(pairs, segments.count);
  Tensor out = torch::stable::new_empty(grad, {n});
  std::vector<double> of_sequence(segments.count);
  const Matrix g = matrix(grad, "grad", 3, pair.count);
  with_compute_type(g.dtype, [&](auto zero) {
    using c = decltype(zero);
    const c* row[3];
    for (int k = 0; k < 3; ++k) row[k] = static_cast<const c*>(g.at(k));
    for (int64_t p = 0; p < pair.count; ++p) {
      of_sequence[pair(p, 0)] += double(row[0][p]) + double(row[1][p]);
      of_sequence[pair(p, 1)] += double(row[2][p]) - double(row[0][p]);
    }
    segments.spread(vector<c>(out, "out", n), of_sequence.data());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CPU, m) {
  m.impl("segment_sum", TORCH_BOX(&segment_sum));
  m.impl("segment_sum_backward", TORCH_BOX(&segment_sum_backward));
  m.impl("pair_margins", TORCH_BOX(&pair_margins));
  m.impl("pair_margins_backward", TORCH_BOX(&pair_margins_backward));
}

}  // namespace fastpref
