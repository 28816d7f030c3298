// sweep_: folds a tile of logits into the running state of its rows and leaves E = exp(z - M)
// behind.
//
// A row is read once, into a buffer that stays in the L1 cache for the three passes over it:
// logits, maximum, exp and sums. -inf in the padding of the buffer and in the target's column makes
// their E exactly 0.
#include "lanes.h"

namespace fastpref {
namespace {

template <class c>
struct Tile {
  ToLogits<c> to;
  int64_t width;
  bool with_stats, stores;
};

template <class c>
FASTPREF_INLINE c sum_of(const c* z, int64_t padded) {
  c lane[kLanes] = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lane[l] += z[j + l];
  }
  return reduce_sum(lane);
}

// NaN never wins: the exponentials carry it into R.
template <class c>
FASTPREF_INLINE c max_of(const c* z, int64_t padded) {
  c lane[kLanes];
  std::copy_n(z, kLanes, lane);
  for (int64_t j = 0; j < padded; j += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lane[l] = z[j + l] > lane[l] ? z[j + l] : lane[l];
  }
  c max = -std::numeric_limits<c>::infinity();
  for (int64_t l = 0; l < kLanes; ++l) max = lane[l] > max ? lane[l] : max;
  return max;
}

// z becomes E; the sums go to the row.
template <class c, bool kStats>
FASTPREF_INLINE void exponentials(c* z, int64_t padded, Row<c>& row) {
  const c shift = shift_of(row.max);
  c sum[kLanes] = {}, weighted[kLanes] = {}, squares[kLanes] = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    c x[kLanes];  // a loop of its own: in the next one the compiler would make a branch of it
    for (int64_t l = 0; l < kLanes; ++l) x[l] = clamp_exponent(z[j + l] - shift);
    for (int64_t l = 0; l < kLanes; ++l) {
      const c e = exp_clamped(x[l]);
      sum[l] += e;
      if constexpr (kStats) {
        weighted[l] += e * x[l];
        squares[l] += e * e;
      }
      z[j + l] = e;
    }
  }
  row.sum += reduce_sum(sum);
  if constexpr (kStats) {
    row.weighted += reduce_sum(weighted);
    row.squares += reduce_sum(squares);
  }
}

template <class c, bool kCapped, bool kStats>
FASTPREF_INLINE c sweep_row_as(c* z, const c* x, int64_t target, const Tile<c>& tile, Row<c>& row) {
  const int64_t width = tile.width, padded = padded_to_lanes(width);
  const bool has_target = target >= 0 && target < width;
  logits<c, kCapped>(z, x, width, tile.to);
  if (has_target) row.target = z[target];
  if constexpr (kStats) {
    std::fill(z + width, z + padded, c(0));
    row.logits += sum_of(z, padded);
  }
  std::fill(z + width, z + padded, -std::numeric_limits<c>::infinity());
  if (has_target) z[target] = -std::numeric_limits<c>::infinity();
  const c shrink = raise_max(row, max_of(z, padded));
  exponentials<c, kStats>(z, padded, row);
  // z, which holds E, becomes G = E * slope of the cap
  if (kCapped && tile.stores) times_slope(z, x, width, tile.to);
  return shrink;
}

}  // namespace

// One row: z, a padded buffer, receives G, if it is stored. Returns the factor of acc.
template <class c>
FASTPREF_CLONES c sweep_row(c* z, const c* x, int64_t target, const Tile<c>& tile, Row<c>& row) {
  if (tile.to.softcap > c(0)) {
    return tile.with_stats ? sweep_row_as<c, true, true>(z, x, target, tile, row)
                           : sweep_row_as<c, true, false>(z, x, target, tile, row);
  }
  return tile.with_stats ? sweep_row_as<c, false, true>(z, x, target, tile, row)
                         : sweep_row_as<c, false, false>(z, x, target, tile, row);
}

template float sweep_row(float*, const float*, int64_t, const Tile<float>&, Row<float>&);
template double sweep_row(double*, const double*, int64_t, const Tile<double>&, Row<double>&);

namespace {

template <class c>
void run(const Matrix& tile, const Matrix& out, const Matrix& state, c* offset, const Matrix& acc,
         const int64_t* targets, int64_t start, const Tile<c>& shape) {
  c* s[6];
  for (int k = 0; k < 6; ++k) s[k] = static_cast<c*>(state.at(k));
  parallel(tile.rows, tile.cols, [&](int64_t first, int64_t last) {
    const Buffer<c> z(tile.cols + kLanes);
    for (int64_t i = first; i < last; ++i) {
      if (targets[i] < 0) {
        std::fill_n(z.get(), tile.cols, c(0));
      } else {
        Row<c> row{s[0][i], s[1][i], s[2][i], s[3][i], s[4][i], s[5][i]};
        const c* x = static_cast<const c*>(tile.at(i));
        const c shrink = sweep_row(z.get(), x, targets[i] - start, shape, row);
        s[0][i] = row.max, s[1][i] = row.sum, s[2][i] = row.target;
        if (shape.with_stats) {
          s[3][i] = row.logits, s[4][i] = row.weighted, s[5][i] = row.squares;
        }
        if (acc && shrink != c(1)) {
          c* a = static_cast<c*>(acc.at(i));
          scale_row(a, a, shrink, acc.cols);
        }
      }
      if (out) store_row(out.at(i), out.dtype, z.get(), tile.cols);
      if (offset != nullptr) offset[i] = s[0][i];
    }
  });
}

void sweep(const Tensor& tile, const OptionalTensor& out, const Tensor& state,
           const OptionalTensor& offset, const OptionalTensor& acc, const Tensor& targets,
           const OptionalTensor& bias, int64_t start, double scale, double softcap,
           bool with_stats) {
  const int64_t n = tile.size(0), width = tile.size(1);
  const int64_t acc_width = acc.has_value() ? acc->size(1) : 0;
  const Matrix x = matrix(tile, "tile", n, width), g = matrix(out, "out", n, width);
  const Matrix s = matrix(state, "state", 6, n), a = matrix(acc, "acc", n, acc_width);
  const int64_t* y = vector<int64_t>(targets, "targets", n);
  STD_TORCH_CHECK(s.dtype == x.dtype && (!a || a.dtype == x.dtype),
                  "state and acc: must have the dtype of tile");
  with_compute_type(x.dtype, [&](auto zero) {
    using c = decltype(zero);
    const ToLogits<c> to{vector<c>(bias, "bias", width), c(scale), c(softcap)};
    const Tile<c> shape{to, width, with_stats, bool(g)};
    run<c>(x, g, s, vector<c>(offset, "offset", n), a, y, start, shape);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CPU, m) { m.impl("sweep_", TORCH_BOX(&sweep)); }

}  // namespace fastpref
