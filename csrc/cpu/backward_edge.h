// The way back through one edge. The gradient of a batch normalisation needs sums over the whole batch,
// so there are two barriers: after the products of the node's gradient with all that the edge adds
// to the node, and between the two convolutions of the separable ones.

#pragma once

#include "backward_sums.h"
#include "preprocess.h"

namespace nas::NAS_ISA {

template <typename S, typename T>
class EdgeBackward {
 public:
  EdgeBackward(const BackwardShared<S, T>& shared, const PoolBackward<S, T>& pools, Arena& arena)
      : shared_(shared),
        weights_(shared.call.shape, shared.geometry.lanes, arena,
                 !Kept<T>(shared.geometry).all, true),
        outputs_(shared, weights_, arena),
        sums_(shared, pools, outputs_, arena),
        weight_sums_(shared.call.shape, shared.geometry.lanes, shared.geometry.chunks, arena) {
    for (auto& slot : between_gradients_) {
      slot = arena.take<Sixteen<S>>(shared.geometry.node_planes());
    }
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
    over_chunks([&](auto... arguments) { find_sums(arguments...); });
    sums_.settle_outputs(s, target);
    over_chunks([&](auto... arguments) { second_convolutions(arguments...); });
    sums_.settle_between(s, target);
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
  void find_sums(int s, int target, int64_t chunk, int64_t thread) {
    shared_.for_blocks(chunk, [&](int64_t block) {
      outputs_.recall(block, thread);
      sums_.dot_products(s, target, block);
    });
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
      shared_.gradient_of(sums_.coefficients(convolution), block, shared_.read(gradient),
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
    const Sixteen<S>* first = outputs_.convolution(kFirst[k].convolution) + at;
    Sixteen<S>* to = between_gradients_[k] + at;
    const Vec<T>* normalise = outputs_.between(k) + group;
    const Vec<T> scale = normalise[0], shift = normalise[g.lanes.groups];
    const Vec<T> centre = normalise[2 * g.lanes.groups];
    Vec<T>* sum = sums_.between(k, block, group);
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
    shared_.gradient_of(sums_.reduced(), block, shared_.read(gradient),
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

  const BackwardShared<S, T>& shared_;
  EdgeWeights<T> weights_;
  EdgeOutputs<S, T> outputs_;
  EdgeSums<S, T> sums_;
  EdgeWeightGradients<T> weight_sums_;
  Sixteen<S>* between_gradients_[2];  // of the edge at hand, between two convolutions in a row
  bool reached_[kSources] = {};
};

}  // namespace nas::NAS_ISA
