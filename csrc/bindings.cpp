// nas._native. Loading it registers the operators of operators.cpp with PyTorch's dispatcher.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "workspace.h"

namespace py = pybind11;

namespace nas {
namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = NAS_TRANSFER_COMPILER;
  info["torch"] = NAS_TRANSFER_TORCH;
  info["instruction_sets"] = instruction_sets();
  info["instruction_set"] = kernels().name;
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
}  // namespace nas

PYBIND11_MODULE(_native, m) {
  m.doc() = "Fused kernels of the supernet; nas.ops.build finds, builds and loads this module.";
  m.def("build_info", &nas::build_info,
        "Compiler, torch version, the instruction sets that are compiled in and that this\n"
        "processor has, the one in use, and whether OpenMP and CUDA are in.");
  m.def("workspace_bytes", &nas::workspace_size, "Memory that the calling thread's kernels hold.");
  m.def("release_workspace", &nas::release_workspace, "Gives that memory back.");
}
