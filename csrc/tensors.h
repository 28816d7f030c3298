// Tensors as the kernels see them: checked once, then plain pointers and 64-bit strides. Shared by
// every device. Messages for people are the Python layer's; these only keep memory safe.
#pragma once

#pragma GCC diagnostic push  // torch's headers, not ours
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <optional>

namespace fastpref {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class c>
inline constexpr ScalarType kDtype = ScalarType::Undefined;
template <>
inline constexpr ScalarType kDtype<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kDtype<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kDtype<int32_t> = ScalarType::Int;
template <>
inline constexpr ScalarType kDtype<int64_t> = ScalarType::Long;

// A matrix of any float dtype whose rows are contiguous. No data where the tensor is absent. Its
// functions are constexpr so that kernels on a GPU may call them.
struct Matrix {
  char* data = nullptr;
  int64_t rows = 0, cols = 0, row_bytes = 0, item_bytes = 0;
  ScalarType dtype = ScalarType::Undefined;

  constexpr explicit operator bool() const { return data != nullptr; }
  constexpr void* at(int64_t row, int64_t col = 0) const {
    return data + row * row_bytes + col * item_bytes;
  }
};

inline Matrix matrix(const Tensor& t, const char* name, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name,
                  ": expected shape (", rows, ", ", cols, ")");
  STD_TORCH_CHECK(t.stride(1) == 1 || cols <= 1, name, ": its rows must be contiguous");
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  name, ": expected float32, float64, bfloat16 or float16");
  const auto item = static_cast<int64_t>(t.element_size());
  return {static_cast<char*>(t.data_ptr()), rows, cols, t.stride(0) * item, item, dtype};
}

inline Matrix matrix(const OptionalTensor& t, const char* name, int64_t rows, int64_t cols) {
  return t.has_value() ? matrix(*t, name, rows, cols) : Matrix{};
}

// A contiguous vector of n numbers of type T.
template <class T>
T* vector(const Tensor& t, const char* name, int64_t n) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n, name, ": expected shape (", n, ",)");
  STD_TORCH_CHECK(t.stride(0) == 1 || n <= 1, name, ": must be contiguous");
  STD_TORCH_CHECK(t.scalar_type() == kDtype<T>, name, ": wrong dtype");
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* vector(const OptionalTensor& t, const char* name, int64_t n) {
  return t.has_value() ? vector<T>(*t, name, n) : nullptr;
}

// Calls f with a zero of the compute type c: float or double.
template <class F>
auto with_compute_type(ScalarType dtype, const F& f) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "the compute dtype must be float32 or float64");
  return dtype == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace fastpref
