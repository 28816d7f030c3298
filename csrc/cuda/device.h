// What the CUDA kernels share on the device: 16-byte accesses that fall back to single elements,
// dtypes known at run time, and sums over a block in a fixed order.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../row_math.h"
#include "../tensors.h"

namespace fastpref {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// A kernel over rows of a model's width: columns of a thread (16 bytes of bf16, 32 of fp32) and
// threads of a block.
inline constexpr int kRowLane = 8, kRowThreads = 256;

// Sized by the launch.
extern __shared__ __align__(16) unsigned char dynamic_shared[];

// k numbers that one thread moves together: one access up to 16 bytes.
template <class T, int k>
struct alignas(sizeof(T) * k < 16 ? sizeof(T) * k : 16) Pack {
  T v[k];

  static __device__ bool fits(const void* at, int count) {
    return count >= k && reinterpret_cast<uintptr_t>(at) % alignof(Pack) == 0;
  }
};

// In the place of a count: all elements exist, and the address is aligned.
struct Whole {};

// to[e] = from[e].
template <class T, int k, class c>
__device__ __forceinline__ void load(c (&to)[k], const T* from, Whole) {
  const auto pack = *reinterpret_cast<const Pack<T, k>*>(from);
#pragma unroll
  for (int e = 0; e < k; ++e) to[e] = static_cast<c>(pack.v[e]);
}

// The same for e < count; 0 from there on.
template <class T, int k, class c>
__device__ __forceinline__ void load(c (&to)[k], const T* from, int count) {
  if (Pack<T, k>::fits(from, count)) return load(to, from, Whole());
#pragma unroll
  for (int e = 0; e < k; ++e) to[e] = e < count ? static_cast<c>(from[e]) : c(0);
}

template <class T, int k, class c>
__device__ __forceinline__ void store(T* to, const c (&from)[k], Whole) {
  Pack<T, k> pack;
#pragma unroll
  for (int e = 0; e < k; ++e) pack.v[e] = static_cast<T>(from[e]);
  *reinterpret_cast<Pack<T, k>*>(to) = pack;
}

template <class T, int k, class c>
__device__ __forceinline__ void store(T* to, const c (&from)[k], int count) {
  if (Pack<T, k>::fits(to, count)) return store(to, from, Whole());
#pragma unroll
  for (int e = 0; e < k; ++e) {
    if (e < count) to[e] = static_cast<T>(from[e]);
  }
}

// Calls f with a null pointer to the type that a dtype stands for. The branch is the same for a
// whole launch: cheaper than a kernel per dtype.
template <class F>
__device__ __forceinline__ void with_stored_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return f(static_cast<c10::BFloat16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<c10::Half*>(nullptr));
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

template <int k, class c>
__device__ __forceinline__ void load(c (&to)[k], const Matrix& m, int64_t row, int64_t col) {
  with_stored_type(m.dtype, [&](auto* type) {
    load(to, static_cast<decltype(type)>(m.at(row, col)), static_cast<int>(m.cols - col));
  });
}

template <int k, class c>
__device__ __forceinline__ void store(const Matrix& m, int64_t row, int64_t col,
                                      const c (&from)[k]) {
  with_stored_type(m.dtype, [&](auto* type) {
    store(static_cast<decltype(type)>(m.at(row, col)), from, static_cast<int>(m.cols - col));
  });
}

struct Add {
  template <class c>
  __device__ c operator()(c a, c b) const {
    return a + b;
  }
};

// NaN never wins.
struct Max {
  template <class c>
  __device__ c operator()(c a, c b) const {
    return std::fmax(a, b);
  }
};

template <int k, class c, class Op>
__device__ __forceinline__ void reduce_warp(c (&x)[k], const Op& op) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < k; ++i) x[i] = op(x[i], __shfl_xor_sync(kAllLanes, x[i], distance));
  }
}

// Reduces k numbers over the block, in an order that depends on its size alone. The first warp has
// the results. One barrier; `partial` may be used again after the next.
template <int k, class c, class Op>
__device__ __forceinline__ void reduce_block(c (&x)[k], c (&partial)[k][kWarp], const Op& op,
                                             c neutral) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  reduce_warp(x, op);
#pragma unroll
  for (int i = 0; i < k; ++i) {
    if (lane == 0) partial[i][warp] = x[i];
  }
  __syncthreads();
  if (warp > 0) return;
#pragma unroll
  for (int i = 0; i < k; ++i)
    x[i] = lane < static_cast<int>(blockDim.x) / kWarp ? partial[i][lane] : neutral;
  reduce_warp(x, op);
}

}  // namespace fastpref
