// robustfast._C: importing it registers the ops; what it offers itself is introspection.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"

#ifndef RF_CUDA_ARCHITECTURES
#define RF_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = "gcc-compatible " __VERSION__;
  info["torch"] = RF_TORCH_VERSION;
  info["cuda_architectures"] = py::str(RF_CUDA_ARCHITECTURES).attr("split")();
#if defined(__x86_64__)
  info["instruction_sets"] = std::vector<std::string>{"baseline", "avx2", "avx512"};
#else
  info["instruction_sets"] = std::vector<std::string>{"baseline"};
#endif
  info["instruction_set"] = robustfast::name(robustfast::active_isa());
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of robustfast.";
  m.def("build_info", &build_info,
        "What this binary was built with (compiler, torch, CUDA architectures, instruction sets) and the instruction "
        "set that runs.");
}
