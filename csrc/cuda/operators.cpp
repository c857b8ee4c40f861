// The operators of csrc/operators.cpp on a GPU.

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../stem_operators.h"
#include "torch_device.h"

namespace nas::cuda {
namespace {

struct Gpu : TorchDevice<Gpu> {
  template <typename F>
  static void with_stream(const at::Tensor& weights, F&& f) {
    const c10::cuda::CUDAGuard guard(weights.device());
    f(c10::cuda::getCurrentCUDAStream(weights.device().index()).stream());
  }
};

TORCH_LIBRARY_IMPL(nas_transfer, CUDA, m) {
  m.impl("mixed_cells", mixed_cells<Gpu>);
  m.impl("mixed_cells_backward", mixed_cells_backward<Gpu>);
  m.impl("stem", stem<Gpu>);
  m.impl("stem_backward", stem_backward<Gpu>);
}

}  // namespace
}  // namespace nas::cuda
