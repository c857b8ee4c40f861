// The way back through the pools of a state: once for all edges that leave it.

#pragma once

#include "backward_shared.h"

namespace nas::NAS_ISA {

template <typename S, typename T>
class PoolBackward {
 public:
  PoolBackward(const BackwardShared<S, T>& shared, Arena& arena) : shared_(shared) {
    const auto& g = shared.geometry;
    for (int s = 0; s < kSources; ++s) {
      for (auto& pooled : pools_[s]) pooled = arena.take<Sixteen<S>>(g.node_planes());
      for (auto& coefficients : coefficients_[s]) {
        coefficients = arena.take<Vec<T>>(3 * g.lanes.groups);
      }
    }
    products_ = arena.take<double>(kEdges * 2 * g.lanes.channels);
    sum_ = arena.take<double>(g.lanes.channels);
  }

  const Sixteen<S>* planes(int s, int average) const { return pools_[s][average]; }
  // [channel]: of the gradient of an edge's node with a pool, to be filled in by the edge
  double* product(int edge, int average) const {
    return products_ + (edge * 2 + average) * shared_.geometry.lanes.channels;
  }

  // Pools one block of a state again.
  void recall(int s, int64_t block, int64_t thread) {
    if (!pools_alive(shared_.call.live, s)) return;
    const auto& g = shared_.geometry;
    const Sixteen<S>* planes = shared_.states[s] + block * g.per_block(g.state_pixels(s));
    Vec<T>* largest = shared_.scratch(thread).row;
    Vec<T>* total = largest + g.state_width(s);
    for (int64_t group = 0; group < g.lanes.groups; ++group) {
      for (int64_t y = 0; y < g.node_height; ++y) {
        const int64_t row = shared_.node_block(block) + group * g.node_pixels + y * g.node_width;
        pool_row(planes + group * g.state_pixels(s), g.state_height(s), g.state_width(s), g.stride(s),
                 y, largest, total, pools_[s][0] + row, pools_[s][1] + row);
      }
    }
  }

  // Coefficients of the gradient through the pools of a state, from all edges that leave it.
  void settle(int s) {
    const auto& g = shared_.geometry;
    const int64_t channels = g.lanes.channels;
    for (int average = 0; average < 2; ++average) {
      std::fill(sum_, sum_ + channels, 0.0);
      std::fill(shared_.product, shared_.product + channels, 0.0);
      for (int target = std::max(2, s + 1); target < kStates; ++target) {
        const int edge = edge_of(s, target);
        if (!shared_.call.live[edge][kMaxPool + average]) continue;
        const double factor = double(shared_.weight(edge, kMaxPool + average));
        const double* product = this->product(edge, average);
        for (int64_t c = 0; c < channels; ++c) {
          sum_[c] += factor * shared_.node_totals[target - 2][c];
          shared_.product[c] += factor * product[c];
        }
      }
      shared_.store_coefficients(1.0, shared_.call.shape.pool_statistics(s, average), sum_,
                                 shared_.product, coefficients_[s][average]);
    }
  }

  // Adds what the pools send back to the gradient of one block of a state.
  void gradient_to_state(int s, int64_t block, int64_t thread) {
    if (!pools_alive(shared_.call.live, s)) return;
    const auto& g = shared_.geometry;
    Vec<T>* mixed = shared_.scratch(thread).gradient;
    const int64_t at = shared_.node_block(block);
    for (int average = 0; average < 2; ++average) {
      gradient_of(s, average, block, mixed + average * g.per_block(g.node_pixels));
    }
    for (int64_t group = 0; group < g.lanes.groups; ++group) {
      const int64_t plane = (block * g.lanes.groups + group) * g.state_pixels(s);
      for (int64_t y = 0; y < g.node_height; ++y) {
        const int64_t row = group * g.node_pixels + y * g.node_width;
        pool_row_gradient(shared_.states[s] + plane, g.state_height(s), g.state_width(s),
                          g.stride(s), y, pools_[s][0] + at + row, mixed + row,
                          mixed + g.per_block(g.node_pixels) + row, shared_.gradients[s] + plane);
      }
    }
  }

 private:
  // The gradient of a state's maxima or averages, from all edges that add them to a node.
  void gradient_of(int s, int average, int64_t block, Vec<T>* to) const {
    const auto& g = shared_.geometry;
    const int64_t at = shared_.node_block(block);
    const Sixteen<S>* gradients[kNodes];
    Vec<T> factors[kNodes];
    int count = 0;
    for (int target = std::max(2, s + 1); target < kStates; ++target) {
      const int edge = edge_of(s, target);
      if (!shared_.call.live[edge][kMaxPool + average]) continue;
      factors[count] = Vec<T>::splat(shared_.weight(edge, kMaxPool + average));
      gradients[count++] = shared_.nodes[target - 2] + at;
    }
    if (!count) return std::fill(to, to + g.per_block(g.node_pixels), Vec<T>::zero());
    with_most<kNodes>(count, [&](auto nodes) NAS_INLINED {
      const auto sum = [&](int64_t i) NAS_INLINED {
        Vec<T> total = factors[0] * widen(gradients[0][i]);
        NAS_UNROLL for (int node = 1; node < nodes; ++node) {
          total += factors[node] * widen(gradients[node][i]);
        }
        return total;
      };
      shared_.gradient_of(coefficients_[s][average], block, sum, pools_[s][average] + at, 0,
                          g.node_pixels, to);
    });
  }

  const BackwardShared<S, T>& shared_;
  Sixteen<S>* pools_[kSources][2];
  Vec<T>* coefficients_[kSources][2];
  double* products_;  // [edge][maximum, average][channel]
  double* sum_;
};

}  // namespace nas::NAS_ISA
