// Whole-row primitives of the CPU kernels. Rows travel through a buffer in the compute type c, so
// that no kernel is written per storage dtype.
#pragma once

#include <algorithm>
#include <cstddef>
#include <new>

#include "../tensors.h"

// One binary, the best instructions of the machine it runs on. Elsewhere the compiler's flags
// decide.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTPREF_CLONED 1
#define FASTPREF_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define FASTPREF_ISA_VARIANTS "x86-64-v4,x86-64-v3,default"
#else
#define FASTPREF_CLONED 0
#define FASTPREF_CLONES
#define FASTPREF_ISA_VARIANTS "default"
#endif

namespace fastpref {

// Elements that one task should touch at least.
inline constexpr int64_t kGrain = 32768;

// f(first, last) over ranges of [0, n), on torch's threads; each of the n items costs `cost`
// elements.
template <class F>
void parallel(int64_t n, int64_t cost, const F& f) {
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost)), f);
}

// Scratch of n elements, aligned to a cache line.
template <class c>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : data_(static_cast<c*>(::operator new(sizeof(c) * static_cast<size_t>(n), kLine))) {}
  ~Buffer() { ::operator delete(data_, kLine); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  c* get() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  c* data_;
};

// n elements at `from`, of any float dtype, as c: `from` itself where it holds c, else `buffer`.
template <class c>
const c* load_row(const void* from, ScalarType dtype, c* buffer, int64_t n);

// to[j] = from[j], rounded to the dtype.
template <class c>
void store_row(void* to, ScalarType dtype, const c* from, int64_t n);

// to[j] = factor * from[j]; exactly 0 for factor 0, whatever `from` holds. In place too.
template <class c>
void scale_row(c* to, const c* from, c factor, int64_t n);

// to[j] += factor * from[j].
template <class c>
void add_row(c* to, const c* from, c factor, int64_t n);

// to[j] = scale * (q * weight[j] - coef * acc[j]).
template <class c>
void gradient_row(c* to, const c* weight, const c* acc, c scale, c q, c coef, int64_t n);

}  // namespace fastpref
