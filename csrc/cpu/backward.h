// The backward pass of a cell.
//
// The forward pass kept the states, the statistics and of the convolutions before their normalisation
// what edge.h, Kept, says; the others, pools, rectified inputs and depthwise outputs are computed
// again. Nodes go from the last to the first, since a node's gradient is complete when all edges that
// leave it are done.

#pragma once

#include "backward_bypass.h"
#include "backward_edge.h"
#include "preprocess.h"

namespace nas::NAS_ISA {

template <typename S, typename T>
class BackwardCell {
 public:
  BackwardCell(const CellBackward<S, T>& call, const ThreadPool& pool, void* workspace)
      : arena_(workspace), shared_(call, pool, arena_), pools_(shared_, arena_),
        bypass_(shared_, arena_), edges_(shared_, pools_, arena_),
        preprocess_(call.shape, pool.threads, arena_, true) {
    const auto& shape = call.shape;
    state_gradients_ = arena_.take<S>(2 * shape.images * shape.height * shape.width * shape.channels);
  }

  int64_t workspace_bytes() const { return arena_.used(); }

  void run() {
    const auto& g = shared_.geometry;
    const auto& call = shared_.call;
    shared_.clear_scratch();
    edges_.pack_weights();
    parallel(shared_.pool, g.chunks.count * kSources, [&](int64_t unit, int64_t thread) {
      recall_state(int(unit % kSources), unit / kSources, thread);
    });
    if (call.operations_gradient) {
      std::fill(call.operations_gradient, call.operations_gradient + kEdges * kOperations, T(0));
    }
    for (int target = kStates - 1; target >= 2; --target) {
      complete_node(target);
      // One edge after the other, since the planes of one stay in the third cache from pass to pass
      // and those of all do not.
      for (int s = 0; s < target; ++s) edges_.run(s, target);
    }
    complete_inputs();
    if (call.bypass_gradient) bypass_.merge();
    if (call.before_gradient || call.previous_gradient || call.weights_gradient) {
      preprocess_.backward(call, state_gradients_, shared_.pool);
    }
  }

 private:
  // A state in the kernels' layout, and its pools.
  void recall_state(int s, int64_t chunk, int64_t thread) {
    const auto& g = shared_.geometry;
    const int64_t channels = g.shape.channels, pixels = g.state_pixels(s);
    const auto& call = shared_.call;
    const Images<const S> from =
        s < 2 ? Images<const S>{call.states + s * g.shape.images * pixels * channels,
                                pixels * channels, channels}
              : Images<const S>{call.output + (s - 2) * channels, pixels * kNodes * channels,
                                kNodes * channels};
    shared_.for_blocks(chunk, [&](int64_t block) {
      Sixteen<S>* planes = shared_.states[s] + block * g.per_block(pixels);
      gather(g.lanes, block, from, pixels, planes, pixels);
      pools_.recall(s, block, thread);
    });
  }

  // All edges that leave a node are done: its gradient, in the kernels' layout.
  void complete_node(int target) {
    if (target < kSources) pools_.settle(target);
    parallel(shared_.pool, shared_.geometry.chunks.count, [&](int64_t chunk, int64_t thread) {
      shared_.for_blocks(chunk, [&](int64_t block) {
        if (target < kSources) finish_state(target, block, thread);
        collect_gradient(target, block, thread);
      });
    });
    merge_sums(shared_.geometry.lanes, shared_.node_sums[target - 2],
               shared_.node_totals[target - 2]);
  }

  // What all edges and the pools send back to the mixed channels of a state.
  void finish_state(int s, int64_t block, int64_t thread) {
    if (!edges_.reached(s)) shared_.clear_gradient(s, block);
    pools_.gradient_to_state(s, block, thread);
  }

  void collect_gradient(int target, int64_t block, int64_t thread) {
    const auto& g = shared_.geometry;
    const int64_t channels = g.shape.channels;
    Sixteen<S>* planes = shared_.nodes[target - 2] + shared_.node_block(block);
    const Vec<T>* inner =
        target < kSources ? shared_.gradients[target] + shared_.node_block(block) : nullptr;
    if (g.shape.partial == 1) {
      const Images<const S> from{shared_.call.output_gradient + (target - 2) * channels,
                                 g.node_pixels * kNodes * channels, kNodes * channels};
      gather(g.lanes, block, from, g.node_pixels, planes, g.node_pixels);
      if (inner) {
        for (int64_t x = 0; x < g.per_block(g.node_pixels); ++x) {
          put(planes[x], widen(planes[x]) + inner[x]);
        }
      }
    } else {
      bypass_.split_gradient(target, block, inner, planes, thread);
    }
    for (int64_t group = 0; group < g.lanes.groups; ++group) {
      Vec<T> even = Vec<T>::zero(), odd = Vec<T>::zero();
      const Sixteen<S>* plane = planes + group * g.node_pixels;
      int64_t x = 0;
      for (; x + 2 <= g.node_pixels; x += 2) {
        even += widen(plane[x]);
        odd += widen(plane[x + 1]);
      }
      if (x < g.node_pixels) even += widen(plane[x]);
      shared_.node_sums[target - 2][block * g.lanes.groups + group] = even + odd;
    }
  }

  // The gradients of the two preprocessed inputs, channels last.
  void complete_inputs() {
    const auto& g = shared_.geometry;
    for (int s = 0; s < 2; ++s) pools_.settle(s);
    parallel(shared_.pool, 2 * g.chunks.count, [&](int64_t unit, int64_t thread) {
      const int s = int(unit % 2);
      const int64_t channels = g.shape.channels;
      const Images<S> to{state_gradients_ + s * g.shape.images * g.pixels * channels,
                         g.pixels * channels, channels};
      shared_.for_blocks(unit / 2, [&](int64_t block) {
        finish_state(s, block, thread);
        const Vec<T>* planes = shared_.gradients[s] + block * g.per_block(g.pixels);
        if (g.shape.partial > 1) {
          bypass_.complete_input(s, block, planes, to.at, thread);
        } else {
          scatter(g.lanes, block, planes, g.pixels, g.pixels, to);
        }
        if (!shared_.call.training) return;
        for (int64_t n = 0; n < g.lanes.images_of(block); ++n) {
          preprocess_.add_up(shared_.call, state_gradients_, s, block * g.lanes.together + n);
        }
      });
    });
  }

  Arena arena_;
  BackwardShared<S, T> shared_;
  PoolBackward<S, T> pools_;
  BypassBackward<S, T> bypass_;
  EdgeBackward<S, T> edges_;
  Preprocess<S, T> preprocess_;
  S* state_gradients_;  // [2, N, H, W, C]
};

}  // namespace nas::NAS_ISA
