// nas._native. Loading it registers the operations of operators.cpp with PyTorch's dispatcher.
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "cpu/cell.h"
#include "cpu/instruction_set.h"

namespace py = pybind11;

namespace nas_transfer {
namespace {

using Build = std::pair<std::string, int>;  // its name, the floats in its vectors

// From the plainest to the widest, in the order of InstructionSet.
std::vector<Build> builds() {
  return {
      {"portable", portable::lanes()},
#if defined(__x86_64__)
      {"avx2", avx2::lanes()},
      {"avx512", avx512::lanes()},
#endif
  };
}

py::dict build_info() {
  const std::vector<Build> compiled = builds();
  py::dict sets;
  for (const auto& [name, lanes] : compiled) {
    sets[py::str(name)] = lanes;
  }
  py::dict info;
  info["compiler"] = NAS_TRANSFER_COMPILER;
  info["torch"] = NAS_TRANSFER_TORCH;
  info["instruction_sets"] = sets;
  info["instruction_set"] = compiled[static_cast<std::size_t>(instruction_set())].first;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(NAS_TRANSFER_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace nas_transfer

PYBIND11_MODULE(_native, m) {
  m.doc() = "Fused kernels of the supernet; nas.ops.build finds, builds and loads this module.";
  m.def("build_info", &nas_transfer::build_info,
        "Compiler, torch version, instruction sets with the floats in their vectors, the one that\n"
        "this processor runs, and whether OpenMP and CUDA are in.");
}
