// What the CUDA sources need of CUDA, in plain C++: included first, it lets a C++ compiler build
// csrc/cuda/*.cu for CPU tensors, so that tests run the kernels themselves where there is no GPU.
//
// A block's threads are fibers of one thread; they take turns, and change only at a barrier or a
// warp's exchange. Those abort the process where some threads of the group can never arrive. Copies
// to shared memory are made when they are waited for, and until then leave NaN.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local  // at block scope static as well: blocks run one after the other

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) \
  _STABLE_TORCH_LIBRARY_IMPL(fastpref_on_host, CPU, m, C10_UID)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline constexpr int kSharedBytes = 36 << 10, kMultiprocessors = 3;
namespace fastpref {
__shared__ __align__(16) unsigned char dynamic_shared[kSharedBytes];
}

namespace cuda_on_host {

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> copies;
  uint64_t exchanged = 0;
  bool done = false;
};

struct Group {
  unsigned size, arrived = 0, generation = 0;
};

inline constexpr size_t kStack = 128 << 10;
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Group> warps;
inline Group block;
inline std::function<void()> body;
inline bool progress;

inline void check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

inline Fiber& self() { return fibers[threadIdx.x]; }
inline Group& warp() { return warps[threadIdx.x / 32]; }

inline void arrive(Group& group) {
  const unsigned generation = group.generation;
  progress = true;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    ++group.generation;
    return;
  }
  while (group.generation == generation) swapcontext(&self().context, &scheduler);
}

inline void enter() {
  body();
  self().done = progress = true;
  swapcontext(&self().context, &scheduler);
}

inline void run_block(unsigned threads) {
  check(threads % 32 == 0 && threads <= 1024, "a block is at most 32 whole warps");
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  warps.assign(threads / 32, Group{32});
  block = Group{threads};
  std::memset(fastpref::dynamic_shared, 0xff, kSharedBytes);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.done = false;
    fiber.copies.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned left = threads; left > 0;) {
    progress = false;
    left = 0;
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
      if (self().done) continue;
      ++left;
      swapcontext(&scheduler, &self().context);
    }
    check(progress || left == 0, "threads wait for one that has returned or waits elsewhere");
  }
}

// What thread `source` of the warp gave.
template <class T>
T exchange(T value, unsigned source) {
  std::memcpy(&self().exchanged, &value, sizeof(T));
  arrive(warp());
  std::memcpy(&value, &fibers[source].exchanged, sizeof(T));
  arrive(warp());
  return value;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::arrive(cuda_on_host::block); }

inline int __syncthreads_or(int predicate) {
  using namespace cuda_on_host;
  self().exchanged = predicate != 0;
  __syncthreads();
  int any = 0;
  for (unsigned t = 0; t < blockDim.x; ++t) any |= fibers[t].exchanged != 0;
  __syncthreads();
  return any;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return cuda_on_host::exchange(value, threadIdx.x ^ static_cast<unsigned>(distance));
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned lanes = 0;
  const unsigned first = threadIdx.x / 32 * 32;
  for (unsigned l = 0; l < 32; ++l)
    lanes |= static_cast<unsigned>(cuda_on_host::exchange(predicate != 0, first + l)) << l;
  return lanes;
}

inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  const auto aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  cuda_on_host::check((bytes == 4 || bytes == 8 || bytes == 16) && aligned(to) && aligned(from),
                      "an asynchronous copy takes 4, 8 or 16 aligned bytes");
  std::memset(to, 0xff, bytes);
  cuda_on_host::self().copies.push_back({to, from, bytes});
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(size_t) {
  for (const auto& copy : cuda_on_host::self().copies) std::memcpy(copy.to, copy.from, copy.bytes);
  cuda_on_host::self().copies.clear();
}

using cudaError_t = int;
using cudaStream_t = void*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetLastError() { return 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrMultiProcessorCount ? kMultiprocessors : kSharedBytes;
  return 0;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return 0;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 1;
  return 0;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  cuda_on_host::check(config->dynamicSmemBytes <= kSharedBytes, "too much shared memory");
  gridDim = config->gridDim, blockDim = config->blockDim;
  cuda_on_host::body = [&] { kernel(args...); };
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) cuda_on_host::run_block(blockDim.x);
  return 0;
}

// Macros, so that a torch built with CUDA does not put its own in their place.
#define DeviceGuard NoDeviceGuard
namespace torch::stable::accelerator {
struct NoDeviceGuard {
  explicit NoDeviceGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator
#define aoti_torch_get_current_cuda_stream(device, stream) (*(stream) = nullptr, 0)
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) cuda_on_host::check((call) == 0, #call)
