// The way back through one edge. The gradient of a batch normalisation needs sums over the whole batch,
// so there are two barriers: after the products of the node's gradient with all that the edge adds
// to the node, and between the two convolutions of the separable ones.

#pragma once

#include "backward_outputs.h"
#include "backward_pool.h"
#include "preprocess.h"

namespace nas::NAS_ISA {

template <typename S, typename T>
class EdgeBackward {
 public:
  EdgeBackward(const BackwardShared<S, T>& shared, const PoolBackward<S, T>& pools, Arena& arena)
      : shared_(shared), pools_(pools),
        weights_(shared.call.shape, shared.geometry.lanes, arena, true),
        outputs_(shared, weights_, arena),
        weight_sums_(shared.call.shape, shared.geometry.lanes, shared.geometry.chunks, arena) {
    const auto& g = shared.geometry;
    const int64_t planes = g.lanes.blocks * g.lanes.groups;
    for (auto& slot : between_gradients_) slot = arena.take<Sixteen<S>>(g.node_planes());
    for (auto& slot : sums_) slot = arena.take<Vec<T>>(2 * planes);
    for (auto& slot : coefficients_) slot = arena.take<Vec<T>>(3 * g.lanes.groups);
    pair_sum_ = arena.take<double>(g.lanes.channels);
  }

  void pack_weights() {
    parallel(shared_.pool, kEdges, [&](int64_t edge, int64_t) {
      int target = 2;
      while (first_edge(target + 1) <= edge) ++target;
      weights_.pack(shared_.call.weights, int(edge), int(edge) - first_edge(target), target);
    });
  }

  // From the gradient of node `target` to that of state `s`, with all weights on the way.
  void run(int s, int target) {
    const auto over_chunks = [&](auto&& pass) {
      parallel(shared_.pool, shared_.geometry.chunks.count, [&](int64_t chunk, int64_t thread) {
        pass(s, target, chunk, thread);
      });
    };
    outputs_.find(s, target);
    over_chunks([&](auto... arguments) { dot_products(arguments...); });
    settle_outputs(s, target);
    over_chunks([&](auto... arguments) { second_convolutions(arguments...); });
    settle_between(s, target);
    over_chunks([&](auto... arguments) { first_convolutions(arguments...); });
    const bool* live = shared_.call.live[edge_of(s, target)];
    reached_[s] = reached_[s] || any_first(live) || live[kSkip];
    if (!shared_.call.weights_gradient) return;
    parallel(shared_.pool, kConvolutions + 1, [&](int64_t convolution, int64_t) {
      weight_sums_.unpack(s, target, int(convolution), live[kSkip],
                          shared_.call.weights_gradient);
    });
  }

  // Whether any edge has written the gradient of state `s` yet.
  bool reached(int s) const { return reached_[s]; }

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

  // Products of the node's gradient with all that an edge adds to the node.
  void dot_products(int s, int target, int64_t chunk, int64_t thread) {
    const auto& g = shared_.geometry;
    Factor factors[kOperations];
    const int count = list_factors(s, target, factors);
    shared_.for_blocks(chunk, [&](int64_t block) {
      outputs_.recall(block, thread);
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        for (int first = 0; first < count; first += kTogether) {
          with_most<kTogether>(count - first, [&](auto some) NAS_INLINED {
            dot_products<some>(target, factors + first, block, group);
          });
        }
      }
    });
  }

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

  // The sums over the batch of one edge: gradients of the mixing weights, and what the gradients
  // of the normalisations need.
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

  // Rows whose gradients are taken together: enough pixels for the weight gradients to pay.
  int64_t strip_rows() const {
    const auto& g = shared_.geometry;
    return std::clamp<int64_t>(kStrip / g.node_width, 1, g.node_height);
  }

  // The gradient of a convolution's output, from `gradient` of what it was normalised to, through
  // its pointwise part into the padded planes, with the weight gradients on the way.
  void gradient_into(const Padded<T>& padded, int edge, int convolution,
                     const Depthwise<T>& depthwise, int64_t block, int64_t chunk,
                     const Padded<T>& input, const Sixteen<S>* gradient, const Scratch<T>& own) {
    const auto& g = shared_.geometry;
    Vec<T>* strip = own.gradient;
    Vec<T>* between = strip + g.per_block(g.node_pixels);
    const Pointwise<T>& pointwise = weights_.pointwise();
    const int64_t rows = strip_rows();
    const Vec<T>* recalled = outputs_.depthwise(convolution, block);
    for (int64_t y = 0; y < g.node_height; y += rows) {
      const int64_t count = std::min(rows, g.node_height - y);
      const int64_t first = y * g.node_width, pixels = count * g.node_width;
      shared_.gradient_of(coefficients_[convolution], block, gradient,
                          outputs_.convolution(convolution) + shared_.node_block(block), first,
                          pixels, strip);
      for (int64_t row = 0; row < count; ++row) {
        pointwise.row(strip + row * g.node_width, pixels, weights_.transposed(edge, convolution),
                      padded.row(0, y + row), padded.plane(), g.node_width);
      }
      if (!shared_.call.weights_gradient) continue;
      if (!recalled) {
        depthwise_rows(depthwise, input, weights_.taps(edge, convolution), y, count, g.node_width,
                       between, pixels);
      }
      pointwise.weight_gradient(recalled ? recalled + first : between,
                                recalled ? g.node_pixels : pixels, strip, pixels, pixels,
                                weight_sums_.matrix(chunk, convolution));
    }
    if (!shared_.call.weights_gradient) return;
    for (int64_t group = 0; group < g.lanes.groups; ++group) {
      depthwise.weight_gradient(
          input.first_tap(group, depthwise.padding()), input.pitch(), padded.row(group, 0),
          padded.pitch(), g.node_height, g.node_width,
          weight_sums_.taps(chunk, convolution) + group * depthwise.taps());
    }
  }

  // The taps of a convolution as its input's gradient needs them.
  static void turn(const Depthwise<T>& depthwise, const Vec<T>* taps, Vec<T>* to) {
    const int count = depthwise.taps();
    for (int tap = 0; tap < count; ++tap) {
      to[tap] = taps[depthwise.stride == 1 ? count - 1 - tap : tap];
    }
  }

  // Row y of the gradient of a depthwise convolution's input.
  static void gradient_row(const Depthwise<T>& depthwise, const Padded<T>& padded, int64_t group,
                           int64_t y, const Vec<T>* turned, Vec<T>* row, int64_t width,
                           bool accumulate) {
    if (depthwise.stride == 1) {
      depthwise.gradient_row(padded.first_tap(group, depthwise.padding()) + y * padded.pitch(),
                             padded.pitch(), turned, row, width, accumulate);
    } else {
      depthwise.strided_gradient_row(padded.row(group, 0), padded.pitch(), turned, row, width, y,
                                     accumulate);
    }
  }

  // Gradients of the second convolutions of an edge, and of a skip connection that reduces.
  void second_convolutions(int s, int target, int64_t chunk, int64_t thread) {
    const auto& g = shared_.geometry;
    const int edge = edge_of(s, target);
    const bool* live = shared_.call.live[edge];
    const bool reducing = live[kSkip] && g.stride(s) == 2;
    const Scratch<T> own = shared_.scratch(thread);
    const Padded<T> input = g.rectified(own.rectified, s);
    const Padded<T> second = g.between(own.second);
    const Padded<T> padded = shared_.padded_gradient(own.padded, 0);
    if (shared_.call.weights_gradient) weight_sums_.clear(chunk);
    shared_.for_blocks(chunk, [&](int64_t block) {
      const Sixteen<S>* gradient = shared_.nodes[target - 2] + shared_.node_block(block);
      for (int k = 0; k < 2; ++k) {
        if (!live[kSecond[k].operation]) continue;
        const int convolution = kSecond[k].convolution;
        const auto depthwise = Depthwise<T>::choose(kSecond[k].size, 1, 1);
        if (shared_.call.weights_gradient) outputs_.rectify_between(k, block, second);
        gradient_into(padded, edge, convolution, depthwise, block, chunk, second, gradient, own);
        Vec<T> turned[25];
        for (int64_t group = 0; group < g.lanes.groups; ++group) {
          turn(depthwise, weights_.taps(edge, convolution) + group * depthwise.taps(), turned);
          for (int64_t y = 0; y < g.node_height; ++y) {
            gradient_row(depthwise, padded, group, y, turned, own.row, g.node_width, false);
            keep_between(k, block, group, y, own.row);
          }
        }
      }
      if (!reducing) return;
      if (!reached_[s]) shared_.clear_gradient(s, block);
      rectify(shared_.states[s] + block * g.per_block(g.state_pixels(s)), input);
      reduce_back(s, target, block, chunk, input, gradient, own);
    });
  }

  // One row of the gradient between two convolutions, with the sums that its normalisation needs.
  void keep_between(int k, int64_t block, int64_t group, int64_t y,
                    const Vec<T>* row) {
    const auto& g = shared_.geometry;
    const int64_t at = shared_.node_block(block) + group * g.node_pixels + y * g.node_width;
    const int convolution = kFirst[k].convolution;
    const Sixteen<S>* first = outputs_.convolution(convolution) + at;
    Sixteen<S>* to = between_gradients_[k] + at;
    const Vec<T>* normalise = outputs_.between(k) + group;
    const Vec<T> scale = normalise[0], shift = normalise[g.lanes.groups];
    const Vec<T> centre = normalise[2 * g.lanes.groups];
    Vec<T>* sum = sums_[convolution] + (block * g.lanes.groups + group) * 2;
    if (y == 0) sum[0] = sum[1] = Vec<T>::zero();
    Vec<T> total = sum[0], product = sum[1];
    for (int64_t x = 0; x < g.node_width; ++x) {
      prefetch(first + x + kAhead);
      const Vec<T> value = widen(first[x]);
      const Vec<T> gradient = keep(to[x], relu_gradient(row[x], value * scale + shift));
      total += gradient;
      product += gradient * (value - centre);
    }
    sum[0] = total;
    sum[1] = product;
  }

  // The stride-2 skip connection; see reduce().
  void reduce_back(int s, int target, int64_t block, int64_t chunk, const Padded<T>& input,
                   const Sixteen<S>* gradient, const Scratch<T>& own) {
    const auto& g = shared_.geometry;
    const Pointwise<T>& pointwise = weights_.pointwise();
    const int slot = reducing_slot(s, target);
    const int64_t width = g.node_width;
    shared_.gradient_of(coefficients_[kReduced], block, gradient,
                        outputs_.reduced() + shared_.node_block(block), 0, g.node_pixels,
                        own.gradient);
    Vec<T>* half = own.row + g.lanes.groups * width;
    for (int odd = 0; odd < 2; ++odd) {
      for (int64_t y = 0; y < g.node_height; ++y) {
        const Vec<T>* row = own.gradient + y * width;
        if (shared_.call.weights_gradient) {
          every_second(input, odd, y, width, own.row);
          pointwise.weight_gradient(own.row, width, row, g.node_pixels, width,
                                    weight_sums_.matrix(chunk, kConvolutions + odd));
        }
        if (2 * y + odd >= g.height) continue;
        for (int64_t group = 0; group < g.lanes.groups; ++group) {
          const Vec<T> mask = channels_from<T>(g.lanes, g.lanes.channels / 2, group);
          for (int64_t x = 0; x < width; ++x) {
            const Vec<T> value = row[group * g.node_pixels + x];
            half[group * width + x] = odd ? select(mask, value) : select(mask, Vec<T>::zero(), value);
          }
        }
        pointwise.row(half, width, weights_.reduce_transposed(slot, odd), own.row, width, width);
        for (int64_t group = 0; group < g.lanes.groups; ++group) {
          const Vec<T>* mask = input.row(group, 2 * y + odd) + odd;
          Vec<T>* to = shared_.gradients[s] +
                       (block * g.lanes.groups + group) * g.pixels + (2 * y + odd) * g.width + odd;
          for (int64_t x = 0; 2 * x + odd < g.width; ++x) {
            to[2 * x] += relu_gradient(own.row[group * width + x], mask[2 * x]);
          }
        }
      }
    }
  }

  // Coefficients of the first convolutions of the separable ones.
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

  // Gradients of the convolutions that look at an edge's input, and of a plain skip connection: added
  // to the state's, which the first edge writes.
  void first_convolutions(int s, int target, int64_t chunk, int64_t thread) {
    const auto& g = shared_.geometry;
    const int edge = edge_of(s, target);
    const bool* live = shared_.call.live[edge];
    const bool skips = live[kSkip] && g.stride(s) == 1;
    if (!any_first(live) && !skips) return;
    const bool begins = !reached_[s] && !(live[kSkip] && g.stride(s) == 2);  // or reduce_back() has
    const Vec<T> skip = Vec<T>::splat(shared_.weight(edge, kSkip));
    const Scratch<T> own = shared_.scratch(thread);
    const Padded<T> input = g.rectified(own.rectified, s);
    Depthwise<T> depthwise[4];
    for (int k = 0; k < 4; ++k) {
      depthwise[k] = Depthwise<T>::choose(kFirst[k].size, kFirst[k].dilation, int(g.stride(s)));
    }
    shared_.for_blocks(chunk, [&](int64_t block) {
      const Sixteen<S>* state = shared_.states[s] + block * g.per_block(g.state_pixels(s));
      if (shared_.call.weights_gradient) rectify(state, input);
      for (int k = 0; k < 4; ++k) {
        if (!live[kFirst[k].operation]) continue;
        const Sixteen<S>* gradient = k < 2 ? between_gradients_[k] : shared_.nodes[target - 2];
        gradient_into(shared_.padded_gradient(own.padded, k), edge, kFirst[k].convolution,
                      depthwise[k], block, chunk, input, gradient + shared_.node_block(block), own);
      }
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        Vec<T> turned[4][25];
        for (int k = 0; k < 4; ++k) {
          const Vec<T>* taps = weights_.taps(edge, kFirst[k].convolution);
          turn(depthwise[k], taps + group * depthwise[k].taps(), turned[k]);
        }
        Vec<T>* to = shared_.gradients[s] + (block * g.lanes.groups + group) * g.state_pixels(s);
        for (int64_t y = 0; y < input.height; ++y) {
          bool begun = false;
          for (int k = 0; k < 4; ++k) {
            if (!live[kFirst[k].operation]) continue;
            gradient_row(depthwise[k], shared_.padded_gradient(own.padded, k), group, y, turned[k],
                         own.row, input.width, begun);
            begun = true;
          }
          const int64_t row = y * input.width, at = group * g.state_pixels(s) + row;
          const Sixteen<S>* mask = state + at;
          const Sixteen<S>* gradient = shared_.nodes[target - 2] + shared_.node_block(block) + at;
          const auto give = [&](auto&& value) NAS_INLINED {
            if (begins) {
              for (int64_t x = 0; x < input.width; ++x) to[row + x] = value(x);
            } else {
              for (int64_t x = 0; x < input.width; ++x) to[row + x] += value(x);
            }
          };
          if (!begun) {
            give([&](int64_t x) NAS_INLINED { return skip * widen(gradient[x]); });
          } else if (!skips) {
            give([&](int64_t x) NAS_INLINED {
              return relu_gradient<T>(own.row[x], widen(mask[x]));
            });
          } else {
            give([&](int64_t x) NAS_INLINED {
              return relu_gradient<T>(own.row[x], widen(mask[x])) + skip * widen(gradient[x]);
            });
          }
        }
      }
    });
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
  EdgeWeights<T> weights_;
  EdgeOutputs<S, T> outputs_;
  EdgeWeightGradients<T> weight_sums_;
  // Of the edge at hand:
  Sixteen<S>* between_gradients_[2];           // between the convolutions of the separable ones
  Vec<T>* sums_[kSums];                        // [block][group], pairs for the first convolutions
  Vec<T>* coefficients_[kSlots];
  double* pair_sum_;
  bool reached_[kSources] = {};
};

}  // namespace nas::NAS_ISA
