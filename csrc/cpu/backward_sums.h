// The sums over the batch that the way back through an edge waits for, and what is made of them:
// gradients of the mixing weights, and coefficients of the gradients of the normalisations.

#pragma once

#include "backward_outputs.h"
#include "backward_pool.h"

namespace nas::NAS_ISA {

template <typename S, typename T>
class EdgeSums {
 public:
  EdgeSums(const BackwardShared<S, T>& shared, const PoolBackward<S, T>& pools,
           const EdgeOutputs<S, T>& outputs, Arena& arena)
      : shared_(shared), pools_(pools), outputs_(outputs) {
    const auto& g = shared.geometry;
    for (auto& slot : sums_) slot = arena.take<Vec<T>>(2 * g.lanes.blocks * g.lanes.groups);
    for (auto& slot : coefficients_) slot = arena.take<Vec<T>>(3 * g.lanes.groups);
    pair_sum_ = arena.take<double>(g.lanes.channels);
  }

  // a, d and b of backward_shared.h [3][group], of a convolution of the edge at hand.
  const Vec<T>* coefficients(int convolution) const { return coefficients_[convolution]; }
  // Of its skip connection that reduces.
  const Vec<T>* reduced() const { return coefficients_[kReduced]; }
  // Sums of a block's gradient between two convolutions in a row, and of its product with what the
  // first gave less the mean: [2], to be filled in.
  Vec<T>* between(int k, int64_t block, int64_t group) const {
    return sums_[kFirst[k].convolution] + (block * shared_.geometry.lanes.groups + group) * 2;
  }

  // Products of one block of the node's gradient with all that an edge adds to the node.
  void dot_products(int s, int target, int64_t block) {
    const auto& g = shared_.geometry;
    Factor factors[kOperations];
    const int count = list_factors(s, target, factors);
    for (int64_t group = 0; group < g.lanes.groups; ++group) {
      for (int first = 0; first < count; first += kTogether) {
        with_most<kTogether>(count - first, [&](auto some) NAS_INLINED {
          dot_products<some>(target, factors + first, block, group);
        });
      }
    }
  }

  // After those of all blocks.
  void settle_outputs(int s, int target) {
    const auto& g = shared_.geometry;
    const int edge = edge_of(s, target);
    const bool* live = shared_.call.live[edge];
    const double* sum = shared_.node_totals[target - 2];
    const auto settle = [&](int operation, int slot, int64_t at, double* product) {
      merge_sums(g.lanes, sums_[slot], product);
      if (shared_.call.operations_gradient) {
        double total = 0;
        for (int64_t c = 0; c < g.lanes.channels; ++c) {
          total += product[c] * (at < 0 ? 1.0 : double(shared_.call.reciprocal_deviation[at + c]));
        }
        shared_.call.operations_gradient[edge * kOperations + operation] = T(total);
      }
      if (slot < kSlots) {
        shared_.store_coefficients(double(shared_.weight(edge, operation)), at, sum, product,
                                   coefficients_[slot]);
      }
    };
    for (int operation = kSep3; operation <= kDil5; ++operation) {
      if (!live[operation]) continue;
      const int convolution = last_convolution(operation);
      settle(operation, convolution, shared_.statistics(s, target, convolution), shared_.product);
    }
    if (live[kSkip]) {
      if (g.stride(s) == 2) {
        settle(kSkip, kReduced, shared_.call.shape.reduce_statistics(reducing_slot(s, target)),
               shared_.product);
      } else if (shared_.call.operations_gradient) {
        settle(kSkip, kSumSkip, -1, shared_.product);
      }
    }
    for (int average = 0; average < 2; ++average) {
      if (!live[kMaxPool + average]) continue;
      settle(kMaxPool + average, kSumMax + average, shared_.call.shape.pool_statistics(s, average),
             pools_.product(edge, average));
    }
  }

  // After between() is filled in: coefficients of the first of two convolutions in a row.
  void settle_between(int s, int target) {
    const bool* live = shared_.call.live[edge_of(s, target)];
    for (int k = 0; k < 2; ++k) {
      if (!live[kFirst[k].operation]) continue;
      const int convolution = kFirst[k].convolution;
      merge_pairs(sums_[convolution]);
      shared_.store_coefficients(1.0, shared_.statistics(s, target, convolution), pair_sum_,
                                 shared_.product, coefficients_[convolution]);
    }
  }

 private:
  // Sums and coefficients of an edge: those of its convolutions, then of what else it adds.
  enum Slot { kReduced = kConvolutions, kSlots };
  enum Sum { kSumSkip = kSlots, kSumMax, kSumAverage, kSums };
  static constexpr int kTogether = kManyRegisters ? kOperations : 4;

  struct Factor {
    int sum;
    const Sixteen<S>* planes;
    int64_t statistic;  // what it is normalised by, or -1
  };

  // Those with `Count` planes: the gradient is read once for all of them.
  template <int Count>
  void dot_products(int target, const Factor* factors, int64_t block, int64_t group) {
    const auto& g = shared_.geometry;
    const int64_t at = shared_.node_block(block) + group * g.node_pixels;
    const Sixteen<S>* gradient = shared_.nodes[target - 2] + at;
    const Sixteen<S>* planes[Count];
    Vec<T> total[Count], shift[Count];
    NAS_UNROLL for (int i = 0; i < Count; ++i) {
      const int64_t statistic = factors[i].statistic;
      planes[i] = factors[i].planes + at;
      total[i] = Vec<T>::zero();
      shift[i] = statistic < 0 ? Vec<T>::zero() : shared_.mean(statistic, group);
    }
    for (int64_t x = 0; x < g.node_pixels; ++x) {
      const Vec<T> value = widen(gradient[x]);
      NAS_UNROLL for (int i = 0; i < Count; ++i) {
        prefetch(planes[i] + x + kAhead);
        total[i] += value * (widen(planes[i][x]) - shift[i]);
      }
    }
    NAS_UNROLL for (int i = 0; i < Count; ++i) {
      sums_[factors[i].sum][block * g.lanes.groups + group] = total[i];
    }
  }

  int list_factors(int s, int target, Factor* factors) const {
    const auto& shape = shared_.call.shape;
    const bool* live = shared_.call.live[edge_of(s, target)];
    int count = 0;
    for (int operation = kSep3; operation <= kDil5; ++operation) {
      if (!live[operation]) continue;
      const int convolution = last_convolution(operation);
      factors[count++] = {convolution, outputs_.convolution(convolution),
                          shared_.statistics(s, target, convolution)};
    }
    if (live[kSkip] && shared_.geometry.stride(s) == 2) {
      factors[count++] = {kReduced, outputs_.reduced(),
                          shape.reduce_statistics(reducing_slot(s, target))};
    } else if (live[kSkip] && shared_.call.operations_gradient) {
      factors[count++] = {kSumSkip, shared_.states[s], -1};
    }
    for (int average = 0; average < 2; ++average) {
      if (!live[kMaxPool + average]) continue;
      factors[count++] = {kSumMax + average, pools_.planes(s, average),
                          shape.pool_statistics(s, average)};
    }
    return count;
  }

  void merge_pairs(const Vec<T>* pairs) {
    const auto& g = shared_.geometry;
    std::fill(pair_sum_, pair_sum_ + g.lanes.channels, 0.0);
    std::fill(shared_.product, shared_.product + g.lanes.channels, 0.0);
    for (int64_t block = 0; block < g.lanes.blocks; ++block) {
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        const Vec<T>* pair = pairs + (block * g.lanes.groups + group) * 2;
        add_lanes(g.lanes, g.lanes.images_of(block), group, pair[0], pair_sum_);
        add_lanes(g.lanes, g.lanes.images_of(block), group, pair[1], shared_.product);
      }
    }
  }

  const BackwardShared<S, T>& shared_;
  const PoolBackward<S, T>& pools_;
  const EdgeOutputs<S, T>& outputs_;
  Vec<T>* sums_[kSums];            // [block][group], pairs for the first of two convolutions
  Vec<T>* coefficients_[kSlots];
  double* pair_sum_;               // [channel]
};

}  // namespace nas::NAS_ISA
