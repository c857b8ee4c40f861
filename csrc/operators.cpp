// The operators that PyTorch's dispatcher knows, with the kernels of the CPU; csrc/cuda/operators.cpp
// adds those of a GPU. What gradients they have, and their shapes without data, is said in
// nas/ops/native.py.

#include <torch/library.h>

#include "cpu/torch_device.h"
#include "stem_operators.h"

namespace nas {
namespace {

TORCH_LIBRARY(nas_transfer, m) {
  m.def(kForwardSchema);
  m.def(kBackwardSchema);
  m.def(kStemSchema);
  m.def(kStemBackwardSchema);
}

TORCH_LIBRARY_IMPL(nas_transfer, CPU, m) {
  m.impl("mixed_cells", mixed_cells<Cpu>);
  m.impl("mixed_cells_backward", mixed_cells_backward<Cpu>);
  m.impl("stem", stem<Cpu>);
  m.impl("stem_backward", stem_backward<Cpu>);
}

}  // namespace
}  // namespace nas
