// What the convolutions of an edge gave, for the way back through it: as the forward pass kept it, or
// computed again.

#pragma once

#include "backward_shared.h"

namespace nas::NAS_ISA {

template <typename S, typename T>
class EdgeOutputs {
 public:
  EdgeOutputs(const BackwardShared<S, T>& shared, const EdgeWeights<T>& weights, Arena& arena)
      : shared_(shared), weights_(weights), kept_(shared.geometry) {
    const auto& g = shared.geometry;
    for (int convolution = 0; convolution < kConvolutions; ++convolution) {
      if (kept_.has(convolution)) continue;
      recalled_[convolution] = arena.take<Sixteen<S>>(g.node_planes());
      depthwise_[convolution] = arena.take<Vec<T>>(g.node_planes());
    }
    for (auto& between : between_) between = arena.take<Vec<T>>(3 * g.lanes.groups);
  }

  // Turns to an edge.
  void find(int s, int target) {
    const auto& g = shared_.geometry;
    source_ = s;
    edge_ = edge_of(s, target);
    const Sixteen<S>* planes = reinterpret_cast<const Sixteen<S>*>(shared_.call.kept);
    for (int convolution = 0; convolution < kConvolutions; ++convolution) {
      planes_[convolution] = kept_.has(convolution)
                                 ? planes + kept_.convolution(edge_, convolution)
                                 : recalled_[convolution];
    }
    if (g.stride(s) == 2) reduced_ = planes + kept_.reduced(reducing_slot(s, target));
    for (int k = 0; k < 2; ++k) {
      const int64_t at = shared_.call.shape.convolution_statistics(edge_, kFirst[k].convolution);
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        const Vec<T> scale = in_lanes<T>(g.lanes, shared_.call.reciprocal_deviation + at, group);
        Vec<T>* to = between_[k] + group;
        to[0] = scale;
        to[g.lanes.groups] = Vec<T>::zero() - shared_.mean(at, group) * scale;
        to[2 * g.lanes.groups] = shared_.mean(at, group);
      }
    }
  }

  // Computes what was not kept of one block.
  void recall(int64_t block, int64_t thread) const {
    const auto& g = shared_.geometry;
    if (kept_.all) return;
    const bool* live = shared_.call.live[edge_];
    const Scratch<T> own = shared_.scratch(thread);
    if (live[kDil3] || live[kDil5]) {
      const Padded<T> input = g.rectified(own.rectified, source_);
      rectify(shared_.states[source_] + block * g.per_block(g.state_pixels(source_)), input);
      for (int k = 2; k < 4; ++k) {
        if (live[kFirst[k].operation]) recall(kFirst[k], int(g.stride(source_)), block, input, own);
      }
    }
    const Padded<T> second = g.between(own.second);
    for (int k = 0; k < 2; ++k) {
      if (!live[kSecond[k].operation]) continue;
      rectify_between(k, block, second);
      recall(kSecond[k], 1, block, second, own);
    }
  }

  // Planes [block][group][pixel], before their normalisation.
  const Sixteen<S>* convolution(int which) const { return planes_[which]; }
  // Of the skip connection that reduces.
  const Sixteen<S>* reduced() const { return reduced_; }
  // The depthwise part of a convolution that was computed again, of one block [group][pixel], for the
  // gradients of weights; null where it was kept.
  const Vec<T>* depthwise(int which, int64_t block) const {
    return depthwise_[which] ? depthwise_[which] + shared_.node_block(block) : nullptr;
  }
  // Scale, shift and mean between two convolutions in a row, [3][group].
  const Vec<T>* between(int k) const { return between_[k]; }
  // The input of the second of them.
  void rectify_between(int k, int64_t block, const Padded<T>& to) const {
    normalise_and_rectify(planes_[kFirst[k].convolution] + shared_.node_block(block), between_[k],
                          between_[k] + shared_.geometry.lanes.groups, to);
  }

 private:
  void recall(const Branch& branch, int stride, int64_t block, const Padded<T>& input,
              const Scratch<T>& own) const {
    const auto& g = shared_.geometry;
    const int which = branch.convolution;
    const int64_t at = shared_.node_block(block);
    Vec<T>* between = shared_.call.weights_gradient ? depthwise_[which] + at : nullptr;
    convolve(Depthwise<T>::choose(branch.size, branch.dilation, stride), weights_.pointwise(), input,
             weights_.taps(edge_, which), weights_.matrix(edge_, which), g.node_height,
             g.node_width, own.row, between, recalled_[which] + at, [](int64_t) {});
  }

  const BackwardShared<S, T>& shared_;
  const EdgeWeights<T>& weights_;
  Kept<T> kept_;
  Sixteen<S>* recalled_[kConvolutions] = {};
  Vec<T>* depthwise_[kConvolutions] = {};
  Vec<T>* between_[2];
  // Of the edge at hand:
  int source_ = 0, edge_ = 0;
  const Sixteen<S>*planes_[kConvolutions], *reduced_ = nullptr;
};

}  // namespace nas::NAS_ISA
