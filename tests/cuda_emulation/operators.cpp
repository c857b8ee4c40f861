// The kernels of csrc/cuda on the host, as torch.ops.nas_transfer_emulated for tensors of the CPU.

#include <torch/library.h>

#include <utility>

#include "geometry.h"
#include "torch_device.h"

namespace nas::cuda {
namespace {

struct Emulated : TorchDevice<Emulated> {
  template <typename F>
  static void with_stream(const at::Tensor&, F&& f) {
    f(Stream());
  }
};

// Pretends that a GPU is filled by so many blocks; returns how many it was before.
int64_t set_blocks(int64_t blocks) { return std::exchange(kBlocks, int(blocks)); }

TORCH_LIBRARY(nas_transfer_emulated, m) {
  m.def("set_blocks(int blocks) -> int", set_blocks);
  m.def(kForwardSchema);
  m.def(kBackwardSchema);
}
TORCH_LIBRARY_IMPL(nas_transfer_emulated, CPU, m) {
  m.impl("mixed_cells", mixed_cells<Emulated>);
  m.impl("mixed_cells_backward", mixed_cells_backward<Emulated>);
}

}  // namespace
}  // namespace nas::cuda
