// The kernels of csrc/cuda on the host, as torch.ops.nas_transfer_emulated for tensors of the CPU.

#include <torch/library.h>

#include "torch_device.h"

namespace nas::cuda {
namespace {

struct Emulated : TorchDevice<Emulated> {
  template <typename F>
  static void with_stream(const at::Tensor&, F&& f) {
    f(Stream());
  }
};

TORCH_LIBRARY(nas_transfer_emulated, m) {
  m.def(kForwardSchema);
  m.def(kBackwardSchema);
}
TORCH_LIBRARY_IMPL(nas_transfer_emulated, CPU, m) {
  m.impl("mixed_cells", mixed_cells<Emulated>);
  m.impl("mixed_cells_backward", mixed_cells_backward<Emulated>);
}

}  // namespace
}  // namespace nas::cuda
