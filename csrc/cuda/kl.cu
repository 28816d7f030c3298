// kl_tile_: a tile's share of KL(reference || policy), and its gradient in the policy's logits.
#include "device.h"
#include "launch.h"

namespace fastpref {
namespace {

// One of the two models: its tile, and M and R of its rows.
template <class c>
struct Model {
  Matrix tile;
  const c *max, *sum, *bias;
  c scale, softcap;

  Model(const Tensor& t, const char* name, const Tensor& state, const OptionalTensor& bias_,
        double scale_, double softcap_)
      : tile(matrix(t, name, t.size(0), t.size(1))),
        bias(vector<c>(bias_, "bias", t.size(1))),
        scale(c(scale_)),
        softcap(c(softcap_)) {
    const Matrix rows = matrix(state, "state", 6, t.size(0));
    STD_TORCH_CHECK(tile.dtype == kDtype<c> && rows.dtype == kDtype<c>,
                    "tiles and states: must have one dtype");
    max = static_cast<const c*>(rows.at(0)), sum = static_cast<const c*>(rows.at(1));
  }
};

template <class c>
struct Kl {
  Model<c> policy, reference;
  Matrix out;
  c* kl;
};

// Logits of a row from column `col` on; 0 past its end.
template <int k, class c>
__device__ __forceinline__ void load_logits(c (&z)[k], const Model<c>& model, int64_t i,
                                            int64_t col) {
  const int rest = static_cast<int>(std::min<int64_t>(model.tile.cols - col, k));
  c bias[k] = {};
  load(z, static_cast<const c*>(model.tile.at(i, col)), rest);
  if (model.bias != nullptr) load(bias, model.bias + col, rest);
  if (model.softcap > c(0)) {
    const c inverse = c(1) / model.softcap;
#pragma unroll
    for (int e = 0; e < k; ++e)
      z[e] = logit<c, true>(z[e], bias[e], model.scale, model.softcap, inverse);
  } else {
#pragma unroll
    for (int e = 0; e < k; ++e) z[e] = logit<c, false>(z[e], bias[e], model.scale, c(0), c(0));
  }
}

// kl_tile_, as RowKernels.kl_tile_ in fastpref/backends/__init__.py defines it.
//
// One thread block: one row, 16 bytes of each tile a thread at a time.
// Bytes: n * w * (2 * sizeof(c) read + sizeof(out) written), and a few numbers a row.
// Why this shape: nothing is carried along a row but the sum, so the loads of a row overlap, and
// many rows share a multiprocessor.
template <class c>
__global__ void __launch_bounds__(kRowThreads, sizeof(c) == 8 ? 2 : 4)
    kl_tile_kernel(const Kl<c> a) {
  constexpr int kLane = 16 / sizeof(c);
  __shared__ c partial[1][kWarp];
  const int64_t i = blockIdx.x;
  const c sum_p = a.policy.sum[i], sum_r = a.reference.sum[i];
  const c shift_p = shift_of(a.policy.max[i]), shift_r = shift_of(a.reference.max[i]);
  const c log_p = std::log(sum_p), log_r = std::log(sum_r);
  const c shared = sum_r < sum_p ? sum_r : sum_p;
  const c factor_p = shared / sum_p, factor_r = shared / sum_r;
  c total[1] = {};
  for (int64_t col = threadIdx.x * kLane; col < a.policy.tile.cols; col += blockDim.x * kLane) {
    c p[kLane], r[kLane];
    load_logits(p, a.policy, i, col);
    load_logits(r, a.reference, i, col);
#pragma unroll
    for (int e = 0; e < kLane; ++e) {
      const c of_p = p[e] - shift_p, of_r = r[e] - shift_r;
      const c policy = factor_p * exp_nonpositive(of_p);
      const c reference = col + e < a.policy.tile.cols ? factor_r * exp_nonpositive(of_r) : c(0);
      total[0] += weigh(reference, (of_r - log_r) - (of_p - log_p));
      c gradient = policy - reference;
      if (a.policy.softcap > c(0)) gradient = weigh(gradient, cap_slope(p[e], a.policy.softcap));
      p[e] = gradient;
    }
    if (a.out) {
      with_stored_type(a.out.dtype, [&](auto* type) {
        store(static_cast<decltype(type)>(a.out.at(i, col)), p,
              static_cast<int>(std::min<int64_t>(a.out.cols - col, kLane)));
      });
    }
  }
  reduce_block(total, partial, Add(), c(0));
  if (threadIdx.x == 0) a.kl[i] += total[0] / shared;
}

void kl_tile(const Tensor& tile, const Tensor& ref_tile, const OptionalTensor& out,
             const Tensor& state, const Tensor& ref_state, const OptionalTensor& bias,
             const OptionalTensor& ref_bias, double scale, double softcap, double ref_scale,
             double ref_softcap, const Tensor& kl) {
  const int64_t n = tile.size(0), width = tile.size(1);
  const Matrix g = matrix(out, "out", n, width);
  matrix(ref_tile, "ref_tile", n, width);
  if (tile.numel() == 0) return;
  const Launch launch(tile, ref_tile, out, state, ref_state, bias, ref_bias, kl);
  with_compute_type(tile.scalar_type(), [&](auto zero) {
    using c = decltype(zero);
    const Kl<c> arguments{{tile, "tile", state, bias, scale, softcap},
                          {ref_tile, "ref_tile", ref_state, ref_bias, ref_scale, ref_softcap},
                          g,
                          vector<c>(kl, "kl", n)};
    const int threads = threads_for(ceil_div(width * int64_t{sizeof(c)}, 16), kRowThreads);
    launch(kl_tile_kernel<c>, n, threads, 0, arguments);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CUDA, m) { m.impl("kl_tile_", TORCH_BOX(&kl_tile)); }

}  // namespace fastpref
