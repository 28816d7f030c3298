// The module fastpref._C, and the schema of every native op, declared once for all devices.
//
// pybind11 makes the module (build information, no tensors); tensors go through LibTorch's stable
// ABI, so one binary serves every torch from 2.10 on. Importing the module registers
// torch.ops.fastpref.*.
#include <pybind11/pybind11.h>

#include "cpu/rows.h"

STABLE_TORCH_LIBRARY(fastpref, m) {
  m.def(
      "sweep_(Tensor(a!) tile, Tensor(b!)? out, Tensor(c!) state, Tensor(d!)? offset, "
      "Tensor(e!)? acc, Tensor targets, Tensor? bias, int start, float scale, float softcap, "
      "bool with_stats) -> ()");
  m.def(
      "combine_(Tensor state, Tensor targets, int vocab_size, float softcap, float scale, "
      "Tensor? acc, Tensor weight, Tensor(a!)? hidden_grad, Tensor(b!) logp, Tensor(c!) q, "
      "Tensor(d!) coef, Tensor(e!)? stats) -> ()");
  m.def("scale_rows_(Tensor(a!) out, Tensor x, Tensor factor) -> ()");
  m.def(
      "add_target_rows_(Tensor(a!) out, Tensor x, Tensor targets, Tensor factor, int start) -> ()");
  m.def(
      "kl_tile_(Tensor(a!) tile, Tensor ref_tile, Tensor(b!)? out, Tensor state, Tensor ref_state, "
      "Tensor? bias, Tensor? ref_bias, float scale, float softcap, float ref_scale, "
      "float ref_softcap, Tensor(c!) kl) -> ()");
  m.def("segment_sum(Tensor values, Tensor cu_seqlens) -> Tensor");
  m.def("segment_sum_backward(Tensor grad, Tensor cu_seqlens, int n) -> Tensor");
  m.def("pair_margins(Tensor logps, Tensor ref_logps, Tensor cu_seqlens, Tensor pairs) -> Tensor");
  m.def("pair_margins_backward(Tensor grad, Tensor cu_seqlens, Tensor pairs, int n) -> Tensor");
}

namespace {

// The variant that the dynamic linker chose for this machine.
const char* active_isa() {
#if FASTPREF_CLONED
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "default";
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = "C++ " __VERSION__;
  info["flags"] = FASTPREF_FLAGS;
  info["isa_variants"] = FASTPREF_ISA_VARIANTS;
  info["isa_active"] = active_isa();
  info["torch_target"] = FASTPREF_TORCH_TARGET;
  info["torch_built_with"] = FASTPREF_TORCH_BUILT_WITH;
  info["cuda"] = FASTPREF_CUDA_VERSION;
  info["cuda_archs"] = FASTPREF_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fastpref. Importing it registers torch.ops.fastpref.*";
  m.def("build_info", &build_info, "How this binary was built and what it runs as, as strings.");
}
