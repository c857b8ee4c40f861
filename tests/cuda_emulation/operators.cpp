// The kernels of csrc/cuda on the host, as torch.ops.nas_transfer_emulated for tensors of the CPU.

#include <torch/library.h>

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include "forward.cuh"
#include "kernels.h"
#include "../../csrc/stem_operators.h"
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

// As if cells had few mixed channels up to so many; returns how many that were before.
int64_t set_few(int64_t channels) { return std::exchange(kFewChannels, int(channels)); }

// How often numbers of images were read or written 1, 2, 4, 8 and 16 bytes at once since this was
// asked for last.
std::vector<int64_t> touched() {
  auto& counts = emulation::Machine::get().touched;
  const std::vector<int64_t> found{counts[1], counts[2], counts[4], counts[8], counts[16]};
  std::fill(std::begin(counts), std::end(counts), 0);
  return found;
}

// How many blocks read a tile of each state in a forward pass in single precision.
std::vector<int64_t> reads(int64_t images, int64_t size, int64_t channels, bool reduction) {
  const CellShape shape{images, size, size, size, size, 4, 4, channels, 1, reduction, false};
  bool live[kEdges][kOperations];
  for (auto& edge : live) std::fill(edge, edge + kOperations, true);
  std::vector<int64_t> found(kSources);
  for (int first = 0; first < kSources; first += first ? 1 : 2) {
    Convolve<float> work{};
    work.in.g.shape = shape;
    work.jobs = leaving(live, first, larger(2, first + 1));
    plan(work);
    for (int group = 0; group < work.groups.count; ++group) {
      ++found[source_of(work.jobs.edge[work.groups.first[group]])];
    }
    if (work.tiling.slab < channels) return {};
  }
  return found;
}

// Bytes of the workspace of a cell in single precision, of square images, forward and backward.
std::vector<int64_t> workspaces(int64_t images, int64_t size, int64_t before, int64_t previous,
                                int64_t channels, int64_t partial, bool reduction,
                                bool previous_reduction) {
  const int64_t wide = previous_reduction ? 2 * size : size;
  const CellShape shape{images,   size,     size,    wide,      wide, before,
                        previous, channels, partial, reduction, previous_reduction};
  float number = 0;
  CellForward<float> forward{shape};
  CellBackward<float> backward{shape};
  forward.kept = backward.weights_gradient = &number;
  return {workspace_bytes<float>(forward), workspace_bytes<float>(backward)};
}

TORCH_LIBRARY(nas_transfer_emulated, m) {
  m.def("reads(int images, int size, int channels, bool reduction) -> int[]", reads);
  m.def("touched() -> int[]", touched);
  m.def("workspaces(int images, int size, int before, int previous, int channels, int partial, "
        "bool reduction, bool previous_reduction) -> int[]", workspaces);
  m.def("set_blocks(int blocks) -> int", set_blocks);
  m.def("set_few(int channels) -> int", set_few);
  m.def(kForwardSchema);
  m.def(kBackwardSchema);
  m.def(kStemSchema);
  m.def(kStemBackwardSchema);
}
TORCH_LIBRARY_IMPL(nas_transfer_emulated, CPU, m) {
  m.impl("mixed_cells", mixed_cells<Emulated>);
  m.impl("mixed_cells_backward", mixed_cells_backward<Emulated>);
  m.impl("stem", stem<Emulated>);
  m.impl("stem_backward", stem_backward<Emulated>);
}

}  // namespace
}  // namespace nas::cuda
