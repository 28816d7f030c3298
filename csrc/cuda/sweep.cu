// sweep_: folds a tile of logits into the running state of its rows and leaves E = exp(z - M)
// behind, in one read and one write.
#include <cuda_pipeline_primitives.h>

#include "device.h"
#include "launch.h"

namespace fastpref {
namespace {

constexpr int kMaxThreads = 512;
// Bytes of a row that one thread holds in registers; the arithmetic of fp64 needs more beside them.
constexpr int thread_bytes(int64_t item_bytes) { return item_bytes == 8 ? 128 : 256; }

// How a tile is cut: `slices` of `width` columns, one after the other, a block of `threads` on each
// row of a slice.
struct Shape {
  int64_t width, slices;
  int threads;
};

// Few slices, alike, each as wide as a block can hold; the least threads that hold one.
constexpr Shape shape_for(int64_t width, int64_t item_bytes, int64_t shared_limit) {
  const int64_t bytes = thread_bytes(item_bytes), per_thread = bytes / item_bytes;
  const int64_t most = std::min<int64_t>(kMaxThreads, shared_limit / bytes / kWarp * kWarp);
  const int64_t slices = ceil_div(width, most * per_thread);
  const int threads = threads_for(ceil_div(ceil_div(width, slices), per_thread), kMaxThreads);
  return {threads * per_thread, slices, threads};
}

constexpr int64_t kStatic = 4 << 10;  // shared memory beside the row, at most
constexpr int64_t kHopper = (227 << 10) - kStatic, kConsumer = (99 << 10) - kStatic;
constexpr bool cut(int64_t width, int64_t item_bytes, int64_t limit, int64_t slice, int64_t slices,
                   int threads) {
  const Shape s = shape_for(width, item_bytes, limit);
  return s.width == slice && s.slices == slices && s.threads == threads;
}
static_assert(cut(32768, 4, kHopper, 32768, 1, 512));
static_assert(cut(8192, 4, kHopper, 8192, 1, 128));
static_assert(cut(8193, 4, kHopper, 10240, 1, 160));
static_assert(cut(50, 4, kHopper, 2048, 1, 32));
static_assert(cut(32769, 4, kHopper, 18432, 2, 288));
static_assert(cut(32768, 8, kHopper, 8192, 4, 512));
static_assert(cut(32768, 4, kConsumer, 16384, 2, 256));

template <class c>
struct Sweep {
  Matrix tile, out, state, acc;
  const c* bias;
  c* offset;
  const int64_t* targets;
  int64_t start;
  c scale, softcap;
  bool only_raise;  // M and acc alone
};

// One thread's share of a row: every warp holds a run of columns, and of each 32 vectors of 16
// bytes a lane has one. So the vectors of a thread are constants apart, and one address leads to
// them all.
template <class c>
struct Share {
  static constexpr int kLane = 16 / sizeof(c), kVectors = thread_bytes(sizeof(c)) / 16;
  using Values = c[kVectors][kLane];

  int first, rest;  // its first column, and the columns from there to the end of the row

  // The barrier keeps the compiler from holding all that follows from `first` in registers.
  __device__ explicit Share(int64_t width) {
    const int thread = static_cast<int>(threadIdx.x);
    first = (thread / kWarp * kVectors * kWarp + thread % kWarp) * kLane;
    asm volatile("" : "+r"(first));
    rest = static_cast<int>(width) - first;
  }

  static constexpr int offset(int vector) { return vector * kWarp * kLane; }
  static constexpr int kSpan = (kVectors - 1) * kWarp * kLane + kLane;

  // Where this thread keeps its share of the coming row; no other thread looks there.
  __device__ c* staged() const { return reinterpret_cast<c*>(dynamic_shared) + first; }

  // Calls f(vector, count, at + its offset) for every vector, of which `count` elements exist. One
  // test tells for all of them whether they are whole.
  template <class T, class F>
  __device__ __forceinline__ void each(T* at, const F& f) const {
    if (Pack<T, kLane>::fits(at, rest - offset(kVectors - 1))) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) f(k, Whole(), at + offset(k));
    } else {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) f(k, rest - offset(k), at + offset(k));
    }
  }

  // Starts the copy of a row to shared memory.
  __device__ void fetch(const c* row) const {
    each(row + first,
         [&](int k, auto count, const c* from) { copy(staged() + offset(k), from, count); });
    __pipeline_commit();
  }

  static __device__ void copy(c* to, const c* from, Whole) {
    __pipeline_memcpy_async(to, from, 16);
  }

  static __device__ void copy(c* to, const c* from, int count) {
    for (int e = 0; e < kLane; ++e) {
      if (e < count) {
        __pipeline_memcpy_async(to + e, from + e, sizeof(c));
      } else {
        to[e] = c(0);
      }
    }
  }
};

// What a block knows of its row.
template <class c, int kSums>
struct Shared {
  c maxima[1][kWarp], sums[kSums][kWarp];
  Row<c> row;
  c shrink;
};

// z of this thread's share of the row fetched last, and their sum. The target's column and what
// lies past the end of the row become -inf, whose E is 0.
template <class c, bool kCapped>
__device__ __forceinline__ c read_logits(typename Share<c>::Values& z, const Share<c>& share,
                                         const Sweep<c>& a, int64_t i, int64_t local) {
  constexpr int kLane = Share<c>::kLane, kVectors = Share<c>::kVectors;
  const c inverse = kCapped ? c(1) / a.softcap : c(0);
  c sum = 0;
  __pipeline_wait_prior(0);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) load(z[k], share.staged() + Share<c>::offset(k), Whole());
  if (a.bias != nullptr) {
    share.each(a.bias + share.first, [&](int k, auto count, const c* from) {
      c bias[kLane];
      load(bias, from, count);
#pragma unroll
      for (int e = 0; e < kLane; ++e) z[k][e] += bias[e];
    });
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
#pragma unroll
    for (int e = 0; e < kLane; ++e) {
      z[k][e] = logit<c, kCapped>(z[k][e], c(0), a.scale, a.softcap, inverse);
      sum += z[k][e];
    }
  }
  const int target = local >= 0 && local < a.tile.cols ? static_cast<int>(local) : -1;
  const bool mine = target >= share.first && target < share.first + Share<c>::kSpan;
  if (share.rest >= Share<c>::kSpan && !mine) return sum;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
#pragma unroll
    for (int e = 0; e < kLane; ++e) {
      const int offset = Share<c>::offset(k) + e;
      const bool hit = offset == target - share.first;
      if (hit) *static_cast<c*>(a.state.at(2, i)) = z[k][e];
      if (hit || offset >= share.rest) z[k][e] = -std::numeric_limits<c>::infinity();
    }
  }
  return sum;
}

// Raises M to the maximum of the block's z. Returns the factor of acc.
template <class c, int kSums>
__device__ __forceinline__ c raise_row(const typename Share<c>::Values& z, Shared<c, kSums>& shared,
                                       Row<c> row) {
  c highest[1] = {-std::numeric_limits<c>::infinity()};
#pragma unroll
  for (int k = 0; k < Share<c>::kVectors; ++k) {
#pragma unroll
    for (int e = 0; e < Share<c>::kLane; ++e) highest[0] = Max()(highest[0], z[k][e]);
  }
  reduce_block(highest, shared.maxima, Max(), -std::numeric_limits<c>::infinity());
  if (threadIdx.x == 0) {
    shared.shrink = raise_max(row, highest[0]);
    shared.row = row;
  }
  __syncthreads();
  return shared.shrink;
}

template <class c>
__device__ __forceinline__ void scale_acc(const Matrix& acc, int64_t i, c factor) {
  constexpr int kLane = Share<c>::kLane;
  for (int64_t col = threadIdx.x * kLane; col < acc.cols; col += blockDim.x * kLane) {
    c* const at = static_cast<c*>(acc.at(i, col));
    c x[kLane];
    load(x, at, static_cast<int>(acc.cols - col));
#pragma unroll
    for (int e = 0; e < kLane; ++e) x[e] = weigh(factor, x[e]);
    store(at, x, static_cast<int>(acc.cols - col));
  }
}

// z becomes G = E * slope of the cap. To `sums`: E, and with statistics E (z - M) and E^2.
template <class c, bool kCapped, int kSums>
__device__ __forceinline__ void exponentials(typename Share<c>::Values& z, c (&sums)[kSums], c max,
                                             c softcap) {
  const c shift = shift_of(max);
#pragma unroll
  for (int k = 0; k < Share<c>::kVectors; ++k) {
#pragma unroll
    for (int e = 0; e < Share<c>::kLane; ++e) {
      const c x = clamp_exponent(z[k][e] - shift);
      const c exponential = exp_clamped(x);
      sums[0] += exponential;
      if constexpr (kSums > 1) {
        sums[1] += exponential * x;
        sums[2] += exponential * exponential;
      }
      // the slope of a column taken out is infinite
      z[k][e] = kCapped ? weigh(exponential, cap_slope(z[k][e], softcap)) : exponential;
    }
  }
}

// sweep_ of one slice of a tile, as RowKernels.sweep_ in fastpref/backends/__init__.py defines it.
//
// One thread block: one row after the other, every gridDim.x-th. The row's logits stay in
// registers, 256 bytes a thread (fp64: 128), from the read to the write; the next row is copied to
// shared memory meanwhile, so that memory does not wait for the arithmetic. Bytes: n * w *
// sizeof(c) read, n * w * sizeof(out) written; acc read and written where M grew. Why this shape:
// 512 threads hold a row of 32,768 fp32 in half of a multiprocessor's registers, and the row after
// it in 128 KiB of shared memory; three barriers a row. A narrower row takes fewer threads, and
// more blocks share a multiprocessor.
template <class c, bool kCapped, bool kStats>
__global__ void __launch_bounds__(kMaxThreads, 1) sweep_kernel(const Sweep<c> a) {
  constexpr int kSums = kStats ? 4 : 1;
  __shared__ Shared<c, kSums> shared;
  const bool first = threadIdx.x == 0;
  const auto fetch = [&](int64_t i, int64_t target) {
    if (target >= 0) Share<c>(a.tile.cols).fetch(static_cast<const c*>(a.tile.at(i)));
  };
  int64_t target = a.targets[blockIdx.x];
  fetch(blockIdx.x, target);
  for (int64_t i = blockIdx.x, next, next_target; i < a.tile.rows; i = next, target = next_target) {
    next = i + gridDim.x;
    next_target = next < a.tile.rows ? a.targets[next] : -1;
    const auto state = [&](int k) -> c& { return *static_cast<c*>(a.state.at(k, i)); };
    const Share<c> share(a.tile.cols);
    typename Share<c>::Values z = {};  // an ignored row's G
    if (target < 0) {
      fetch(next, next_target);
    } else {
      Row<c> row{};
      if (first) {
        row.max = state(0), row.sum = state(1);
        if (kStats) row.logits = state(3), row.weighted = state(4), row.squares = state(5);
      }
      c sums[kSums] = {};
      const c logits = read_logits<c, kCapped>(z, share, a, i, target - a.start);
      const c shrink = raise_row(z, shared, row);
      fetch(next, next_target);
      if (a.acc && shrink != c(1)) scale_acc(a.acc, i, shrink);
      if (!a.only_raise) {
        exponentials<c, kCapped>(z, sums, shared.row.max, a.softcap);
        if (kStats) sums[kSums - 1] = logits;
      }
      reduce_block(sums, shared.sums, Add(), c(0));
      if (first) {
        row = shared.row;
        state(0) = row.max, state(1) = row.sum + sums[0];
        if constexpr (kStats) {
          state(3) = row.logits + sums[3];
          state(4) = row.weighted + sums[1], state(5) = row.squares + sums[2];
        }
      }
    }
    if (first && a.offset != nullptr) a.offset[i] = state(0);
    if (!a.out) continue;
    with_stored_type(a.out.dtype, [&](auto* type) {
      auto* const to = static_cast<decltype(type)>(a.out.at(i));
      share.each(to + share.first, [&](int k, auto count, auto* at) { store(at, z[k], count); });
    });
  }
}

template <class c>
auto kernel_for(bool capped, bool with_stats) {
  if (capped) return with_stats ? sweep_kernel<c, true, true> : sweep_kernel<c, true, false>;
  return with_stats ? sweep_kernel<c, false, true> : sweep_kernel<c, false, false>;
}

Matrix columns(const Matrix& m, int64_t first, int64_t width) {
  if (!m) return m;
  Matrix part = m;
  part.data = static_cast<char*>(m.at(0, first));
  part.cols = std::min(width, m.cols - first);
  return part;
}

// A slice leaves M where a later one may raise it, but what is stored needs the last M: a tile of
// several slices is read twice, the first time for M. Also where nothing is stored, so that it does
// not change a bit of R whether a gradient is wanted.
template <class c>
void run(const Launch& launch, const Sweep<c>& whole, bool with_stats) {
  const Shape shape =
      shape_for(whole.tile.cols, sizeof(c),
                launch.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStatic);
  const auto kernel = kernel_for<c>(whole.softcap > c(0), with_stats);
  const size_t bytes = static_cast<size_t>(shape.threads) * thread_bytes(sizeof(c));
  const int64_t blocks = launch.resident_blocks(kernel, shape.threads, bytes);
  const auto slices = [&](bool only_raise) {
    for (int64_t first = 0; first < whole.tile.cols; first += shape.width) {
      Sweep<c> part = whole;
      part.only_raise = only_raise;
      part.tile = columns(whole.tile, first, shape.width);
      part.out = columns(only_raise ? Matrix{} : whole.out, first, shape.width);
      if (part.bias != nullptr) part.bias += first;
      part.start += first;
      launch(kernel, std::min(blocks, whole.tile.rows), shape.threads, bytes, part);
    }
  };
  if (shape.slices > 1) slices(true);
  slices(false);
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
  if (tile.numel() == 0) return;
  const Launch launch(tile, out, state, offset, acc, targets, bias);
  with_compute_type(x.dtype, [&](auto zero) {
    using c = decltype(zero);
    Sweep<c> whole{};
    whole.tile = x, whole.out = g, whole.state = s, whole.acc = a;
    whole.bias = vector<c>(bias, "bias", width), whole.offset = vector<c>(offset, "offset", n);
    whole.targets = y, whole.start = start, whole.scale = c(scale), whole.softcap = c(softcap);
    run<c>(launch, whole, with_stats);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CUDA, m) { m.impl("sweep_", TORCH_BOX(&sweep)); }

}  // namespace fastpref
