// How the CUDA ops start their kernels: on the device of the tensors, on torch's current stream,
// and checked. Host code only.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "../tensors.h"
#include "device.h"

namespace fastpref {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads of a block, whole warps and at most `limit`, for a row of `items`.
constexpr int threads_for(int64_t items, int limit) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(items, 32) * 32, 32, limit));
}

// Threads of a block on a row of a model's width.
constexpr int row_threads(int64_t width) {
  return threads_for(ceil_div(width, kRowLane), kRowThreads);
}

// Makes the device of `first` current while it lives; the other tensors must be there too.
class Launch {
 public:
  template <class... Tensors>
  explicit Launch(const Tensor& first, const Tensors&... others)
      : device_(first.get_device_index()), guard_(device_) {
    (check(others), ...);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
  }

  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device_));
    return value;
  }

  // Blocks of the kernel that run at the same time; lets it use `shared` bytes per block.
  template <class Kernel>
  int64_t resident_blocks(Kernel* kernel, int threads, size_t shared) const {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared)));
    int each = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared));
    return int64_t{std::max(1, each)} * attribute(cudaDevAttrMultiProcessorCount);
  }

  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared,
                  Args&&... args) const {
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "too many rows for one launch");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream_);
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  void check(const Tensor& t) const {
    STD_TORCH_CHECK(t.get_device_index() == device_, "all tensors must be on one CUDA device");
  }
  void check(const OptionalTensor& t) const {
    if (t.has_value()) check(*t);
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace fastpref
