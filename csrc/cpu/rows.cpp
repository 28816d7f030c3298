// The row primitives, and the two ops that are nothing else: scale_rows_ and add_target_rows_.
#include "rows.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../row_math.h"

namespace fastpref {
namespace {

template <class To, class From>
FASTPREF_INLINE void convert(void* to, const void* from, int64_t n) {
  To* out = static_cast<To*>(to);
  const From* in = static_cast<const From*>(from);
  for (int64_t j = 0; j < n; ++j) out[j] = static_cast<To>(in[j]);
}

}  // namespace

template <class c>
FASTPREF_CLONES const c* load_row(const void* from, ScalarType dtype, c* buffer, int64_t n) {
  if (dtype == kDtype<c>) return static_cast<const c*>(from);
  if (dtype == ScalarType::Float) convert<c, float>(buffer, from, n);
  if (dtype == ScalarType::Double) convert<c, double>(buffer, from, n);
  if (dtype == ScalarType::BFloat16) convert<c, c10::BFloat16>(buffer, from, n);
  if (dtype == ScalarType::Half) convert<c, c10::Half>(buffer, from, n);
  return buffer;
}

template <class c>
FASTPREF_CLONES void store_row(void* to, ScalarType dtype, const c* from, int64_t n) {
  if (dtype == ScalarType::Float) convert<float, c>(to, from, n);
  if (dtype == ScalarType::Double) convert<double, c>(to, from, n);
  if (dtype == ScalarType::BFloat16) convert<c10::BFloat16, c>(to, from, n);
  if (dtype == ScalarType::Half) convert<c10::Half, c>(to, from, n);
}

template <class c>
FASTPREF_CLONES void scale_row(c* to, const c* from, c factor, int64_t n) {
  if (factor == c(0)) {
    std::fill_n(to, n, c(0));
    return;
  }
  for (int64_t j = 0; j < n; ++j) to[j] = factor * from[j];
}

template <class c>
FASTPREF_CLONES void add_row(c* to, const c* from, c factor, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] += factor * from[j];
}

template <class c>
FASTPREF_CLONES void gradient_row(c* to, const c* weight, const c* acc, c scale, c q, c coef,
                                  int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] = hidden_gradient(weight[j], acc[j], scale, q, coef);
}

template const float* load_row(const void*, ScalarType, float*, int64_t);
template const double* load_row(const void*, ScalarType, double*, int64_t);
template void store_row(void*, ScalarType, const float*, int64_t);
template void store_row(void*, ScalarType, const double*, int64_t);
template void scale_row(float*, const float*, float, int64_t);
template void scale_row(double*, const double*, double, int64_t);
template void add_row(float*, const float*, float, int64_t);
template void add_row(double*, const double*, double, int64_t);
template void gradient_row(float*, const float*, const float*, float, float, float, int64_t);
template void gradient_row(double*, const double*, const double*, double, double, double, int64_t);

namespace {

void scale_rows(const Tensor& out, const Tensor& x, const Tensor& factor) {
  const int64_t n = out.size(0), width = out.size(1);
  const Matrix to = matrix(out, "out", n, width), from = matrix(x, "x", n, width);
  with_compute_type(factor.scalar_type(), [&](auto zero) {
    using c = decltype(zero);
    const c* factors = vector<c>(factor, "factor", n);
    parallel(n, width, [&](int64_t first, int64_t last) {
      const Buffer<c> buffer(width);
      for (int64_t i = first; i < last; ++i) {
        const c* row = load_row(from.at(i), from.dtype, buffer.get(), width);
        scale_row(buffer.get(), row, factors[i], width);
        store_row(to.at(i), to.dtype, buffer.get(), width);
      }
    });
  });
}

// Threads share the columns, not the rows: rows with the same target then add in a fixed order.
void add_target_rows(const Tensor& out, const Tensor& x, const Tensor& targets,
                     const Tensor& factor, int64_t start) {
  const int64_t n = x.size(0), width = x.size(1), columns = out.size(0);
  const Matrix to = matrix(out, "out", columns, width), from = matrix(x, "x", n, width);
  const int64_t* target = vector<int64_t>(targets, "targets", n);
  with_compute_type(to.dtype, [&](auto zero) {
    using c = decltype(zero);
    const c* factors = vector<c>(factor, "factor", n);
    parallel(width, n, [&](int64_t first, int64_t last) {
      const Buffer<c> buffer(last - first);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t column = target[i] - start;
        if (target[i] < 0 || column < 0 || column >= columns || factors[i] == c(0)) continue;
        const c* row = load_row(from.at(i, first), from.dtype, buffer.get(), last - first);
        add_row(static_cast<c*>(to.at(column, first)), row, factors[i], last - first);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CPU, m) {
  m.impl("scale_rows_", TORCH_BOX(&scale_rows));
  m.impl("add_target_rows_", TORCH_BOX(&add_target_rows));
}

}  // namespace fastpref
