// kl_tile_: a tile's share of KL(reference || policy), and its gradient in the policy's logits.
//
// A row is taken in blocks that stay in the L1 cache, those of both models side by side.
#include "lanes.h"

namespace fastpref {
namespace {

constexpr int64_t kBlock = 1024;  // columns

// A row of one model's tile, from some column on.
template <class c>
struct Line {
  c* z;  // padded
  const c* x;
  ToLogits<c> to;
  c shift, log_sum, factor;  // the probability, up to a factor that both share, is factor * E

  Line from(int64_t column) const {
    return {z, x + column, to.from(column), shift, log_sum, factor};
  }
};

// z becomes log E = logit - M; -inf in the padding.
template <class c>
FASTPREF_INLINE void exponents(const Line<c>& a, int64_t width) {
  const int64_t padded = padded_to_lanes(width);
  if (a.to.softcap > c(0)) {
    logits<c, true>(a.z, a.x, width, a.to);
  } else {
    logits<c, false>(a.z, a.x, width, a.to);
  }
  std::fill(a.z + width, a.z + padded, -std::numeric_limits<c>::infinity());
  for (int64_t j = 0; j < padded; ++j) a.z[j] -= a.shift;
}

}  // namespace

// Returns the sum of r (log r - log p) over the block, times the factor that p and r share; p.z
// receives that factor times (p - r) * slope of the cap.
template <class c>
FASTPREF_CLONES c kl_block(const Line<c>& p, const Line<c>& r, int64_t width, bool stores) {
  exponents(p, width);
  exponents(r, width);
  const int64_t padded = padded_to_lanes(width);
  c sum[kLanes] = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    c x[kLanes], y[kLanes];  // a loop of its own: in the next one the compiler would branch
    for (int64_t l = 0; l < kLanes; ++l) x[l] = clamp_exponent(p.z[j + l]);
    for (int64_t l = 0; l < kLanes; ++l) y[l] = clamp_exponent(r.z[j + l]);
    for (int64_t l = 0; l < kLanes; ++l) {
      const c policy = p.factor * exp_clamped(x[l]), reference = r.factor * exp_clamped(y[l]);
      const c gap = (r.z[j + l] - r.log_sum) - (p.z[j + l] - p.log_sum);
      sum[l] += weigh(reference, gap);
      p.z[j + l] = policy - reference;
    }
  }
  if (stores && p.to.softcap > c(0)) times_slope(p.z, p.x, width, p.to);
  return reduce_sum(sum);
}

template float kl_block(const Line<float>&, const Line<float>&, int64_t, bool);
template double kl_block(const Line<double>&, const Line<double>&, int64_t, bool);

namespace {

// One of the two models: its tile, and M and R of its rows.
template <class c>
struct Model {
  Matrix tile;
  const c *max, *sum;
  ToLogits<c> to;

  Model(const Tensor& t, const char* name, const Tensor& state, const OptionalTensor& bias,
        double scale, double softcap)
      : tile(matrix(t, name, t.size(0), t.size(1))),
        to{vector<c>(bias, "bias", t.size(1)), c(scale), c(softcap)} {
    const Matrix rows = matrix(state, "state", 6, t.size(0));
    STD_TORCH_CHECK(tile.dtype == kDtype<c> && rows.dtype == kDtype<c>,
                    "tiles and states: must have one dtype");
    max = static_cast<const c*>(rows.at(0)), sum = static_cast<const c*>(rows.at(1));
  }

  Line<c> line(c* z, int64_t i, c shared) const {
    return {z,
            static_cast<const c*>(tile.at(i)),
            to,
            shift_of(max[i]),
            std::log(sum[i]),
            shared / sum[i]};
  }
};

template <class c>
void run(const Model<c>& policy, const Model<c>& reference, const Matrix& out, c* kl) {
  const int64_t width = policy.tile.cols;
  parallel(policy.tile.rows, 2 * width, [&](int64_t first, int64_t last) {
    const Buffer<c> buffer(2 * kBlock);
    for (int64_t i = first; i < last; ++i) {
      const c shared = std::min(policy.sum[i], reference.sum[i]);
      const Line<c> p = policy.line(buffer.get(), i, shared);
      const Line<c> r = reference.line(buffer.get() + kBlock, i, shared);
      c sum = 0;
      for (int64_t j = 0; j < width; j += kBlock) {
        const int64_t count = std::min(kBlock, width - j);
        sum += kl_block(p.from(j), r.from(j), count, bool(out));
        if (out) store_row(out.at(i, j), out.dtype, p.z, count);
      }
      kl[i] += sum / shared;
    }
  });
}

void kl_tile(const Tensor& tile, const Tensor& ref_tile, const OptionalTensor& out,
             const Tensor& state, const Tensor& ref_state, const OptionalTensor& bias,
             const OptionalTensor& ref_bias, double scale, double softcap, double ref_scale,
             double ref_softcap, const Tensor& kl) {
  const int64_t n = tile.size(0), width = tile.size(1);
  const Matrix g = matrix(out, "out", n, width);
  matrix(ref_tile, "ref_tile", n, width);
  with_compute_type(tile.scalar_type(), [&](auto zero) {
    using c = decltype(zero);
    const Model<c> policy(tile, "tile", state, bias, scale, softcap);
    const Model<c> reference(ref_tile, "ref_tile", ref_state, ref_bias, ref_scale, ref_softcap);
    run<c>(policy, reference, g, vector<c>(kl, "kl", n));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CPU, m) { m.impl("kl_tile_", TORCH_BOX(&kl_tile)); }

}  // namespace fastpref
