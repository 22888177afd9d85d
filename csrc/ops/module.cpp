// robustfast._C: importing it registers the ops; what it offers itself is introspection.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "common/normal.h"
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

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const auto words = robustfast::philox4x32({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
  return {words.w0, words.w1, words.w2, words.w3};
}

std::array<float, 2> box_muller(uint32_t w0, uint32_t w1) {
  const robustfast::Pair normals = robustfast::box_muller<robustfast::Polynomials>(w0, w1, 1);
  return {normals.first, normals.second};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of robustfast.";
  m.def("build_info", &build_info,
        "What this binary was built with (compiler, torch, CUDA architectures, instruction sets) and the instruction "
        "set that runs.");
  m.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"), "Philox4x32-10: four words of a counter.");
  m.def("box_muller", &box_muller, py::arg("w0"), py::arg("w1"), "Two normals of two words.");
}
