// The backward pass of a cell.
//
// The forward pass kept the states, the statistics and what each convolution gave before its
// normalisation; pools, rectified inputs and depthwise outputs are computed again. Nodes go from
// the last to the first, since a node's gradient is complete when all edges that leave it are done.
// An edge takes two barriers, since the gradient of a batch normalisation needs sums over the whole
// batch:
//
//   dy = a g + d y + b,   a = w r,   d = -w r^3 <g, y - m> / M,   b = -w r <g, 1> / M - d m
//
// with w the mixing weight, r the reciprocal deviation, m the mean and M the numbers a channel.
// The products <g, y - m> r are the gradients of the mixing weights, too.

#pragma once

#include "bypass.h"
#include "edge.h"
#include "preprocess.h"

namespace nas::NAS_ISA {

template <typename T>
class BackwardCell {
 public:
  BackwardCell(const CellBackward<T>& call, const ThreadPool& pool, void* workspace)
      : call_(call), pool_(pool), geometry_(call.shape), arena_(workspace),
        weights_(call.shape, geometry_.lanes, arena_, true),
        preprocess_(call.shape, pool.threads, arena_, true) {
    const auto& g = geometry_;
    const int64_t planes = g.lanes.blocks * g.lanes.groups;
    for (int s = 0; s < kSources; ++s) {
      states_[s] = arena_.take<Vec<T>>(g.state_planes(s));
      gradients_[s] = arena_.take<Vec<T>>(g.state_planes(s));
      for (auto& pooled : pools_[s]) pooled = arena_.take<Vec<T>>(g.node_planes());
      for (auto& coefficients : pool_coefficients_[s]) {
        coefficients = arena_.take<Vec<T>>(3 * g.lanes.groups);
      }
    }
    for (auto& node : node_gradients_) node = arena_.take<Vec<T>>(g.node_planes());
    for (auto& node : node_sums_) node = arena_.take<Vec<T>>(planes);
    for (auto& node : node_totals_) node = arena_.take<double>(g.lanes.channels);
    pool_totals_ = arena_.take<double>(kEdges * 2 * g.lanes.channels);
    bypass_sums_ = arena_.take<Vec<T>>(kEdges * g.lanes.blocks);
    merged_ = arena_.take<double>(4 * g.lanes.channels);
    pair_sum_ = arena_.take<double>(g.lanes.channels);
    pair_product_ = arena_.take<double>(g.lanes.channels);
    for (auto& slot : between_gradients_) slot = arena_.take<Vec<T>>(g.node_planes());
    for (auto& slot : sums_) slot = arena_.take<Vec<T>>(2 * planes);
    for (auto& slot : coefficients_) slot = arena_.take<Vec<T>>(3 * g.lanes.groups);
    taps_ = arena_.take<Vec<T>>(g.chunks.count * kTaps * g.lanes.groups);
    matrices_ =
        arena_.take<Vec<T>>(g.chunks.count * (kConvolutions + 2) * weights_.pointwise().weights());
    state_gradients_ = arena_.take<T>(2 * g.shape.images * g.pixels * g.shape.channels);
    for (auto& node : rest_gradients_) {
      node = arena_.take<T>(
          g.shape.partial > 1 ? g.shape.images * g.node_pixels * g.shape.channels : 0);
    }
    scratch_size_ = g.rectified_size() + g.between(nullptr).size() + 4 * padded_gradient(nullptr, 0).size() +
                    2 * g.per_block(g.node_pixels) + 2 * g.lanes.groups * g.width + 2 * g.width;
    scratch_ = arena_.take<Vec<T>>(pool.threads * scratch_size_);
    passed_size_ = g.shape.partial > 1 ? g.node_width * g.shape.channels : 0;
    passed_ = arena_.take<T>(pool.threads * passed_size_);
    const bool halves = g.shape.partial > 1 && g.shape.reduction;
    pooled_ = arena_.take<T>(halves ? 2 * g.shape.images * g.node_pixels * g.shape.channels : 0);
  }

  int64_t workspace_bytes() const { return arena_.used(); }

  void run() {
    const auto& g = geometry_;
    std::fill(scratch_, scratch_ + pool_.threads * scratch_size_, Vec<T>::zero());  // all borders
    parallel(pool_, kEdges, [&](int64_t edge, int64_t) {
      int target = 2;
      while (first_edge(target + 1) <= edge) ++target;
      weights_.pack(call_.weights, int(edge), int(edge) - first_edge(target), target);
    });
    parallel(pool_, g.chunks.count * kSources, [&](int64_t unit, int64_t thread) {
      recall_state(int(unit % kSources), unit / kSources, thread);
    });
    if (call_.operations_gradient) {
      std::fill(call_.operations_gradient, call_.operations_gradient + kEdges * kOperations, T(0));
    }
    for (int target = kStates - 1; target >= 2; --target) {
      complete_node(target);
      go_back(target);
    }
    complete_inputs();
    if (call_.bypass_gradient) merge_bypass();
    if (call_.before_gradient || call_.previous_gradient || call_.weights_gradient) {
      preprocess_.backward(call_, state_gradients_, pool_);
    }
  }

 private:
  enum Slot { kA3, kA5, kY3, kY5, kD3, kD5, kReduced, kSlots };  // an edge's convolutions
  enum Sum { kSumSkip = kSlots, kSumMax, kSumAverage, kSums };

  static constexpr int slot_of(int convolution) {
    constexpr int slots[] = {kA3, kY3, kA5, kY5, kD3, kD5};
    return slots[convolution];
  }

  struct Scratch {
    Vec<T>*rectified, *second, *padded, *gradient, *row;
  };
  Scratch scratch(int64_t thread) const {
    const auto& g = geometry_;
    Scratch s;
    s.rectified = scratch_ + thread * scratch_size_;
    s.second = s.rectified + g.rectified_size();
    s.padded = s.second + g.between(nullptr).size();
    s.gradient = s.padded + 4 * padded_gradient(nullptr, 0).size();
    s.row = s.gradient + 2 * g.per_block(g.node_pixels);
    return s;
  }
  // One for each of the convolutions that look at an edge's input.
  Padded<T> padded_gradient(Vec<T>* at, int which) const {
    const auto& g = geometry_;
    const Padded<T> first{at, g.lanes.groups, g.node_height, g.node_width, kPadding};
    return {at + which * first.size(), first.groups, first.height, first.width, first.padding};
  }

  template <typename F>
  void for_blocks(int64_t chunk, F&& f) {
    for (int64_t b = geometry_.chunks.begin(chunk); b < geometry_.chunks.end(chunk); ++b) f(b);
  }
  int64_t node_block(int64_t block) const {
    return block * geometry_.per_block(geometry_.node_pixels);
  }
  Vec<T> mean(int64_t at, int64_t group) const {
    return in_lanes<T>(geometry_.lanes, call_.mean + at, group);
  }
  int64_t statistics(int source, int target, int convolution) const {
    return call_.shape.convolution_statistics(edge_of(source, target), convolution);
  }
  T weight(int edge, int operation) const {
    return call_.operations[edge * kOperations + operation];
  }

  // A state in the kernels' layout, and its pools.
  void recall_state(int s, int64_t chunk, int64_t thread) {
    const auto& g = geometry_;
    const int64_t channels = g.shape.channels, pixels = g.state_pixels(s);
    const Images<const T> from =
        s < 2 ? Images<const T>{call_.states + s * g.shape.images * pixels * channels,
                                pixels * channels, channels}
              : Images<const T>{call_.output + (s - 2) * channels, pixels * kNodes * channels,
                                kNodes * channels};
    Vec<T>* largest = scratch(thread).row;
    Vec<T>* total = largest + g.state_width(s);
    for_blocks(chunk, [&](int64_t block) {
      Vec<T>* planes = states_[s] + block * g.per_block(pixels);
      gather(g.lanes, block, from, pixels, planes, pixels);
      std::fill(gradients_[s] + block * g.per_block(pixels),
                gradients_[s] + (block + 1) * g.per_block(pixels), Vec<T>::zero());
      if (!pools_alive(call_.live, s)) return;
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        for (int64_t y = 0; y < g.node_height; ++y) {
          const int64_t row = node_block(block) + group * g.node_pixels + y * g.node_width;
          pool_row(planes + group * pixels, g.state_height(s), g.state_width(s), g.stride(s), y,
                   largest, total, pools_[s][0] + row, pools_[s][1] + row);
        }
      }
    });
  }

  // All edges that leave a node are done: its gradient, in the kernels' layout.
  void complete_node(int target) {
    const auto& g = geometry_;
    if (target < kSources) settle_pools(target);
    parallel(pool_, g.chunks.count, [&](int64_t chunk, int64_t thread) {
      for_blocks(chunk, [&](int64_t block) {
        if (target < kSources) pool_gradient(target, block, thread);
        collect_gradient(target, block, thread);
      });
    });
    merge_sums(g.lanes, node_sums_[target - 2], node_totals_[target - 2]);
  }

  void collect_gradient(int target, int64_t block, int64_t thread) {
    const auto& g = geometry_;
    const int64_t channels = g.shape.channels;
    Vec<T>* planes = node_gradients_[target - 2] + node_block(block);
    const Vec<T>* inner =
        target < kSources ? gradients_[target] + node_block(block) : nullptr;
    if (g.shape.partial == 1) {
      const Images<const T> from{call_.output_gradient + (target - 2) * channels,
                                 g.node_pixels * kNodes * channels, kNodes * channels};
      gather(g.lanes, block, from, g.node_pixels, planes, g.node_pixels);
      if (inner) {
        for (int64_t x = 0; x < g.per_block(g.node_pixels); ++x) planes[x] += inner[x];
      }
    } else {
      split_gradient(target, block, inner, planes, passed_ + thread * passed_size_);
    }
    for (int64_t group = 0; group < g.lanes.groups; ++group) {
      Vec<T> even = Vec<T>::zero(), odd = Vec<T>::zero();
      const Vec<T>* plane = planes + group * g.node_pixels;
      int64_t x = 0;
      for (; x + 2 <= g.node_pixels; x += 2) {
        even += plane[x];
        odd += plane[x + 1];
      }
      if (x < g.node_pixels) even += plane[x];
      node_sums_[target - 2][block * g.lanes.groups + group] = even + odd;
    }
  }

  // PC-DARTS: undoes the shuffle; the mixed channels go on, the others go by the edges.
  void split_gradient(int target, int64_t block, const Vec<T>* inner, Vec<T>* planes, T* row) {
    const auto& g = geometry_;
    const int64_t channels = g.shape.channels, mixed = g.lanes.channels, width = g.node_width;
    const Images<const T> from{call_.output_gradient + (target - 2) * channels,
                               g.node_pixels * kNodes * channels, kNodes * channels};
    if (!g.lanes.full(block)) {
      std::fill(planes, planes + g.per_block(g.node_pixels), Vec<T>::zero());
    }
    Vec<T> products[kStates];
    for (auto& product : products) product = Vec<T>::zero();
    for (int64_t n = 0; n < g.lanes.images_of(block); ++n) {
      const int64_t image = block * g.lanes.together + n;
      for (int64_t y = 0; y < g.node_height; ++y) {
        Images<const T> gradient = from.skip(y * width);
        gradient.at += image * from.image;
        if (inner) {
          send_back(target, image, y, gradient, products, row);
          add_channels(g.lanes, inner + y * width, g.node_pixels, n, width, row, channels);
          gradient = {row, 0, channels};
        }
        for (int64_t x = 0; x < width; ++x) {
          const int64_t place = y * width + x;
          unshuffle(gradient.at + x * gradient.pixel, mixed, g.shape.partial,
                    reinterpret_cast<T*>(planes + place) + n * g.lanes.group,
                    g.node_pixels * kLanes,
                    rest_gradients_[target - 2] + (image * g.node_pixels + place) * channels);
        }
      }
    }
    if (inner) keep_products(target, block, products);
  }

  // What the edges that leave state `s` let pass by sends back to a row of its pixels, added to
  // `own`; adds to products[target] what that edge's weight gets.
  void send_back(int s, int64_t image, int64_t y, Images<const T> own, Vec<T>* products, T* to) {
    const auto& g = geometry_;
    const int first = std::max(2, s + 1), count = kStates - first;
    const int64_t place = image * g.node_pixels + y * g.node_width;
    const T* gradients[kSources] = {};
    T weights[kSources] = {};
    for (int k = 0; k < count; ++k) {
      gradients[k] = rest_gradients_[first + k - 2] + place * g.shape.channels;
      weights[k] = call_.bypass[edge_of(s, first + k)];
    }
    Images<const T> state = passing(g, s, call_.states, call_.output, pooled_);
    state.at += image * state.image + y * g.node_width * state.pixel;
    with_edges(count, [&](auto edges) {
      PassedRow<T>(g, g.node_width)
          .template send_back<edges>(gradients, weights, state, own, products + first, to);
    });
  }

  void keep_products(int s, int64_t block, const Vec<T>* products) {
    for (int target = std::max(2, s + 1); target < kStates; ++target) {
      bypass_sums_[edge_of(s, target) * geometry_.lanes.blocks + block] = products[target];
    }
  }

  // Sends the gradient of a node back through its edges. One after the other, since the planes of
  // one edge stay in the third cache from pass to pass and those of all edges do not.
  void go_back(int target) {
    for (int s = 0; s < target; ++s) {
      const auto over_chunks = [&](auto&& pass) {
        parallel(pool_, geometry_.chunks.count, [&](int64_t chunk, int64_t thread) {
          pass(s, target, chunk, thread);
        });
      };
      prepare_edge(s, target);
      over_chunks([&](auto... arguments) { dot_products(arguments...); });
      settle_outputs(s, target);
      over_chunks([&](auto... arguments) { second_convolutions(arguments...); });
      settle_between(s, target);
      over_chunks([&](auto... arguments) { first_convolutions(arguments...); });
      if (!call_.weights_gradient) continue;
      parallel(pool_, kConvolutions + 1, [&](int64_t convolution, int64_t) {
        unpack(s, target, int(convolution));
      });
    }
  }

  // Where an edge's convolutions were kept, and scale and shift between those of the separable ones.
  void prepare_edge(int s, int target) {
    const auto& g = geometry_;
    const Kept<T> kept(g);
    const Vec<T>* planes = reinterpret_cast<const Vec<T>*>(call_.kept);
    for (int convolution = 0; convolution < kConvolutions; ++convolution) {
      outputs_[slot_of(convolution)] =
          planes + kept.convolution(edge_of(s, target), convolution);
    }
    if (g.stride(s) == 2) {
      outputs_[kReduced] = planes + kept.reduced(reducing_slot(s, target));
    }
    for (int k = 0; k < 2; ++k) {
      const int64_t at = statistics(s, target, kFirst[k].convolution);
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        const Vec<T> scale = in_lanes<T>(g.lanes, call_.reciprocal_deviation + at, group);
        Vec<T>* to = coefficients_[kA3 + k] + group;
        to[0] = scale;
        to[g.lanes.groups] = Vec<T>::zero() - mean(at, group) * scale;
      }
    }
  }

  // Products of the node's gradient with all that an edge adds to the node; a piece of the gradient
  // stays in the nearest cache for all of them.
  void dot_products(int s, int target, int64_t chunk, int64_t) {
    const auto& g = geometry_;
    constexpr int64_t piece = 64;
    Factor factors[kOperations];
    const int count = list_factors(s, target, factors);
    for_blocks(chunk, [&](int64_t block) {
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        const int64_t at = node_block(block) + group * g.node_pixels;
        const Vec<T>* gradient = node_gradients_[target - 2] + at;
        Vec<T> totals[kOperations], shifts[kOperations];
        for (int i = 0; i < count; ++i) {
          totals[i] = Vec<T>::zero();
          const int64_t statistic = factors[i].statistic;
          shifts[i] = statistic < 0 ? Vec<T>::zero() : mean(statistic, group);
        }
        for (int64_t x = 0; x < g.node_pixels; x += piece) {
          const int64_t pixels = std::min(piece, g.node_pixels - x);
          for (int i = 0; i < count; ++i) {
            add_product(totals[i], gradient + x, factors[i].planes + at + x, shifts[i], pixels);
          }
        }
        for (int i = 0; i < count; ++i) {
          sums_[factors[i].sum][block * g.lanes.groups + group] = totals[i];
        }
      }
    });
  }

  struct Factor {
    int sum;
    const Vec<T>* planes;
    int64_t statistic;  // what it is normalised by, or -1
  };
  int list_factors(int s, int target, Factor* factors) const {
    const auto& shape = call_.shape;
    const bool* live = call_.live[edge_of(s, target)];
    int count = 0;
    for (int operation = kSep3; operation <= kDil5; ++operation) {
      if (!live[operation]) continue;
      const int convolution = last_convolution(operation), slot = slot_of(convolution);
      factors[count++] = {slot, outputs_[slot], statistics(s, target, convolution)};
    }
    if (live[kSkip] && geometry_.stride(s) == 2) {
      factors[count++] = {kReduced, outputs_[kReduced],
                          shape.reduce_statistics(reducing_slot(s, target))};
    } else if (live[kSkip]) {
      factors[count++] = {kSumSkip, states_[s], -1};
    }
    for (int average = 0; average < 2; ++average) {
      if (!live[kMaxPool + average]) continue;
      factors[count++] = {kSumMax + average, pools_[s][average], shape.pool_statistics(s, average)};
    }
    return count;
  }

  void rectify_between(int k, int64_t block, const Padded<T>& to) const {
    const Vec<T>* scale = coefficients_[kA3 + k];
    normalise_and_rectify(outputs_[kA3 + k] + node_block(block), scale,
                          scale + geometry_.lanes.groups, to);
  }

  // The sums over the batch of one edge: gradients of the mixing weights, and what the gradients
  // of the normalisations need.
  void settle_outputs(int s, int target) {
    const auto& g = geometry_;
    const int edge = edge_of(s, target);
    const bool* live = call_.live[edge];
    const double* sum = node_totals_[target - 2];
    const auto settle = [&](int operation, int slot, int64_t at, double* product) {
      merge_sums(g.lanes, sums_[slot], product);
      if (call_.operations_gradient) {
        double total = 0;
        for (int64_t c = 0; c < g.lanes.channels; ++c) {
          total += product[c] * (at < 0 ? 1.0 : double(call_.reciprocal_deviation[at + c]));
        }
        call_.operations_gradient[edge * kOperations + operation] = T(total);
      }
      if (slot < kSlots) {
        store_coefficients(double(weight(edge, operation)), at, sum, product,
                           coefficients_[slot]);
      }
    };
    for (int operation = kSep3; operation <= kDil5; ++operation) {
      if (!live[operation]) continue;
      const int convolution = last_convolution(operation);
      settle(operation, slot_of(convolution), statistics(s, target, convolution), merged_);
    }
    if (live[kSkip]) {
      if (g.stride(s) == 2) {
        settle(kSkip, kReduced, call_.shape.reduce_statistics(reducing_slot(s, target)), merged_);
      } else {
        settle(kSkip, kSumSkip, -1, merged_);
      }
    }
    for (int average = 0; average < 2; ++average) {
      if (!live[kMaxPool + average]) continue;
      settle(kMaxPool + average, kSumMax + average, call_.shape.pool_statistics(s, average),
             pool_totals_ + (edge * 2 + average) * g.lanes.channels);
    }
  }

  // a, d and b of the formula at the top, in lanes: [a, d, b][group].
  void store_coefficients(double weight, int64_t at, const double* sum, const double* product,
                          Vec<T>* to) {
    const auto& g = geometry_;
    const int64_t channels = g.lanes.channels;
    const double each = call_.training ? 1.0 / double(g.shape.images * g.node_pixels) : 0.0;
    double* values = merged_ + channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double r = double(call_.reciprocal_deviation[at + c]);
      const double a = weight * r, d = -a * r * r * product[c] * each;
      values[c] = a;
      values[channels + c] = d;
      values[2 * channels + c] = -a * sum[c] * each - d * double(call_.mean[at + c]);
    }
    for (int part = 0; part < 3; ++part) {
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        to[part * g.lanes.groups + group] =
            in_lanes<T>(g.lanes, values + part * channels, group);
      }
    }
  }

  // Rows whose gradients are taken together: enough pixels for the weight gradients to pay.
  int64_t strip_rows() const {
    return std::clamp<int64_t>(kStrip / geometry_.node_width, 1, geometry_.node_height);
  }

  // dy of the formula at the top, for rows of one block: [group][pixel]. Lanes of missing images
  // stay zero.
  void gradient_of(const Vec<T>* coefficients, int64_t block, const Vec<T>* gradient,
                   const Vec<T>* planes, int64_t first, int64_t pixels, Vec<T>* to) const {
    const auto& g = geometry_;
    for (int64_t group = 0; group < g.lanes.groups; ++group) {
      const Vec<T>* at = coefficients + group;
      const Vec<T> a = without_missing(g.lanes, block, at[0]);
      const Vec<T> d = without_missing(g.lanes, block, at[g.lanes.groups]);
      const Vec<T> b = without_missing(g.lanes, block, at[2 * g.lanes.groups]);
      const Vec<T>* from = gradient + group * g.node_pixels + first;
      const Vec<T>* plane = planes + group * g.node_pixels + first;
      if (!call_.training) {  // d and b are zero, which would make NaN of infinity
        for (int64_t x = 0; x < pixels; ++x) to[group * pixels + x] = a * from[x];
        continue;
      }
      for (int64_t x = 0; x < pixels; ++x) {
        to[group * pixels + x] = a * from[x] + (d * plane[x] + b);
      }
    }
  }

  // The gradient of a convolution's output, from `gradient` of what it was normalised to, through
  // its pointwise part into the padded planes, with the weight gradients on the way.
  void gradient_into(const Padded<T>& padded, int s, int edge, int convolution,
                     const Depthwise<T>& depthwise, int64_t block, int64_t chunk,
                     const Padded<T>& input, const Vec<T>* gradient, const Scratch& own) {
    const auto& g = geometry_;
    Vec<T>* strip = own.gradient;
    Vec<T>* between = strip + g.per_block(g.node_pixels);
    const Pointwise<T>& pointwise = weights_.pointwise();
    const int slot = slot_of(convolution);
    const int64_t rows = strip_rows();
    for (int64_t y = 0; y < g.node_height; y += rows) {
      const int64_t count = std::min(rows, g.node_height - y);
      const int64_t first = y * g.node_width, pixels = count * g.node_width;
      gradient_of(coefficients_[slot], block, gradient, outputs_[slot] + node_block(block),
                  first, pixels, strip);
      for (int64_t row = 0; row < count; ++row) {
        pointwise.row(strip + row * g.node_width, pixels, weights_.transposed(edge, convolution),
                      padded.row(0, y + row), padded.plane(), g.node_width);
      }
      if (call_.weights_gradient) {
        depthwise_rows(depthwise, input, weights_.taps(edge, convolution), y, count, g.node_width,
                       between);
        pointwise.weight_gradient(between, pixels, strip, pixels, pixels,
                                  matrix_sums(chunk, convolution));
      }
    }
    if (!call_.weights_gradient) return;
    const DepthwiseSlot table = depthwise_slot(convolution);
    for (int64_t group = 0; group < g.lanes.groups; ++group) {
      depthwise.weight_gradient(
          input.first_tap(group, depthwise.padding()), input.pitch(), padded.row(group, 0),
          padded.pitch(), g.node_height, g.node_width,
          tap_sums(chunk) + table.offset() * g.lanes.groups + group * depthwise.taps());
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

  // Gradients of the second convolutions of an edge, and of its skip connection.
  void second_convolutions(int s, int target, int64_t chunk, int64_t thread) {
    const auto& g = geometry_;
    const int edge = edge_of(s, target);
    const bool* live = call_.live[edge];
    const bool reducing = live[kSkip] && g.stride(s) == 2;
    const Scratch own = scratch(thread);
    const Padded<T> input = g.rectified(own.rectified, s);
    const Padded<T> second = g.between(own.second);
    const Padded<T> padded = padded_gradient(own.padded, 0);
    if (call_.weights_gradient) clear_sums(chunk);
    for_blocks(chunk, [&](int64_t block) {
      const Vec<T>* gradient = node_gradients_[target - 2] + node_block(block);
      for (int k = 0; k < 2; ++k) {
        if (!live[kSecond[k].operation]) continue;
        const int convolution = kSecond[k].convolution;
        const auto depthwise = Depthwise<T>::choose(kSecond[k].size, 1, 1);
        if (call_.weights_gradient) rectify_between(k, block, second);
        gradient_into(padded, s, edge, convolution, depthwise, block, chunk, second, gradient,
                      own);
        Vec<T> turned[25];
        for (int64_t group = 0; group < g.lanes.groups; ++group) {
          turn(depthwise, weights_.taps(edge, convolution) + group * depthwise.taps(), turned);
          for (int64_t y = 0; y < g.node_height; ++y) {
            gradient_row(depthwise, padded, group, y, turned, own.row, g.node_width, false);
            keep_between(s, target, k, block, group, y, own.row);
          }
        }
      }
      if (!live[kSkip]) return;
      if (reducing) rectify(states_[s] + block * g.per_block(g.state_pixels(s)), input);
      skip_gradient(s, target, block, chunk, input, gradient, own);
    });
  }

  // One row of the gradient between two convolutions, with the sums that its normalisation needs.
  void keep_between(int s, int target, int k, int64_t block, int64_t group, int64_t y,
                    const Vec<T>* row) {
    const auto& g = geometry_;
    const int64_t at = node_block(block) + group * g.node_pixels + y * g.node_width;
    const Vec<T>* first = outputs_[kA3 + k] + at;
    Vec<T>* to = between_gradients_[k] + at;
    const Vec<T>* normalise = coefficients_[kA3 + k] + group;  // see prepare_edge
    const Vec<T> scale = normalise[0], shift = normalise[g.lanes.groups];
    const Vec<T> centre = mean(statistics(s, target, kFirst[k].convolution), group);
    Vec<T>* sum = sums_[kA3 + k] + (block * g.lanes.groups + group) * 2;
    if (y == 0) sum[0] = sum[1] = Vec<T>::zero();
    Vec<T> total = sum[0], product = sum[1];
    for (int64_t x = 0; x < g.node_width; ++x) {
      const Vec<T> gradient = relu_gradient(row[x], first[x] * scale + shift);
      to[x] = gradient;
      total += gradient;
      product += gradient * (first[x] - centre);
    }
    sum[0] = total;
    sum[1] = product;
  }

  void skip_gradient(int s, int target, int64_t block, int64_t chunk,
                     const Padded<T>& input, const Vec<T>* gradient, const Scratch& own) {
    const auto& g = geometry_;
    if (g.stride(s) == 1) {
      const Vec<T> factor = Vec<T>::splat(weight(edge_of(s, target), kSkip));
      Vec<T>* to = gradients_[s] + node_block(block);
      for (int64_t x = 0; x < g.per_block(g.node_pixels); ++x) to[x] += factor * gradient[x];
      return;
    }
    const Pointwise<T>& pointwise = weights_.pointwise();
    const int slot = reducing_slot(s, target);
    const int64_t width = g.node_width;
    gradient_of(coefficients_[kReduced], block, gradient,
                outputs_[kReduced] + node_block(block), 0, g.node_pixels, own.gradient);
    Vec<T>* half = own.row + g.lanes.groups * width;
    for (int odd = 0; odd < 2; ++odd) {
      for (int64_t y = 0; y < g.node_height; ++y) {
        const Vec<T>* row = own.gradient + y * width;
        if (call_.weights_gradient) {
          every_second(input, odd, y, width, own.row);
          pointwise.weight_gradient(own.row, width, row, g.node_pixels, width,
                                    matrix_sums(chunk, kConvolutions + odd));
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
          Vec<T>* to = gradients_[s] +
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
    const bool* live = call_.live[edge_of(s, target)];
    for (int k = 0; k < 2; ++k) {
      if (!live[kFirst[k].operation]) continue;
      merge_pairs(sums_[kA3 + k]);
      store_coefficients(1.0, statistics(s, target, kFirst[k].convolution), pair_sum_, pair_product_,
                         coefficients_[kA3 + k]);
    }
  }

  // Gradients of the convolutions that look at an edge's input: their sum is masked and added once.
  void first_convolutions(int s, int target, int64_t chunk, int64_t thread) {
    const auto& g = geometry_;
    const int edge = edge_of(s, target);
    const bool* live = call_.live[edge];
    if (!any_first(live)) return;
    const Scratch own = scratch(thread);
    const Padded<T> input = g.rectified(own.rectified, s);
    Depthwise<T> depthwise[4];
    for (int k = 0; k < 4; ++k) {
      depthwise[k] = Depthwise<T>::choose(kFirst[k].size, kFirst[k].dilation, int(g.stride(s)));
    }
    for_blocks(chunk, [&](int64_t block) {
      const Vec<T>* state = states_[s] + block * g.per_block(g.state_pixels(s));
      if (call_.weights_gradient) rectify(state, input);
      for (int k = 0; k < 4; ++k) {
        if (!live[kFirst[k].operation]) continue;
        const Vec<T>* gradient = k < 2 ? between_gradients_[k] : node_gradients_[target - 2];
        gradient_into(padded_gradient(own.padded, k), s, edge, kFirst[k].convolution, depthwise[k],
                      block, chunk, input, gradient + node_block(block), own);
      }
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        Vec<T> turned[4][25];
        for (int k = 0; k < 4; ++k) {
          const Vec<T>* taps = weights_.taps(edge, kFirst[k].convolution);
          turn(depthwise[k], taps + group * depthwise[k].taps(), turned[k]);
        }
        Vec<T>* to = gradients_[s] + (block * g.lanes.groups + group) * g.state_pixels(s);
        for (int64_t y = 0; y < input.height; ++y) {
          bool begun = false;
          for (int k = 0; k < 4; ++k) {
            if (!live[kFirst[k].operation]) continue;
            gradient_row(depthwise[k], padded_gradient(own.padded, k), group, y, turned[k],
                         own.row, input.width, begun);
            begun = true;
          }
          const int64_t row = y * input.width;
          const Vec<T>* mask = state + group * g.state_pixels(s) + row;
          for (int64_t x = 0; x < input.width; ++x) {
            to[row + x] += relu_gradient(own.row[x], mask[x]);
          }
        }
      }
    });
  }

  Vec<T>* tap_sums(int64_t chunk) const {
    return taps_ + chunk * kTaps * geometry_.lanes.groups;
  }
  Vec<T>* matrix_sums(int64_t chunk, int convolution) const {
    return matrices_ +
           (chunk * (kConvolutions + 2) + convolution) * weights_.pointwise().weights();
  }
  void clear_sums(int64_t chunk) {
    std::fill(tap_sums(chunk), tap_sums(chunk + 1), Vec<T>::zero());
    std::fill(matrix_sums(chunk, 0), matrix_sums(chunk + 1, 0), Vec<T>::zero());
  }

  // The sums over chunks of one convolution's gradients, in the order of the parameters.
  void unpack(int s, int target, int convolution) {
    const auto& g = geometry_;
    const int64_t c = g.lanes.channels, inputs = weights_.pointwise().inputs();
    const int edge = edge_of(s, target);
    const auto over_chunks = [&](auto&& at) {
      Vec<T> total = at(0);
      for (int64_t chunk = 1; chunk < g.chunks.count; ++chunk) total += at(chunk);
      return total;
    };
    const auto matrix = [&](int which, T* to, int64_t first, int64_t last) {
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        for (int64_t in = 0; in < c; ++in) {
          const Vec<T> total = over_chunks([&](int64_t chunk) {
            return matrix_sums(chunk, which)[group * inputs + in];
          });
          T values[kLanes] = {};
          add_lanes(g.lanes, g.lanes.together, 0, total, values);
          for (int64_t o = 0; o < g.lanes.channels_of(group); ++o) {
            const int64_t column = group * kLanes + o;
            if (column >= first && column < last) to[in * c + column] = values[o];
          }
        }
      }
    };
    if (convolution == kConvolutions) {
      if (!g.shape.reduction || s >= 2) return;
      T* to = call_.weights_gradient + g.shape.reduce() + reducing_slot(s, target) * c * c;
      if (!call_.live[edge][kSkip]) {
        std::fill(to, to + c * c, T(0));
        return;
      }
      matrix(kConvolutions, to, 0, c / 2);
      matrix(kConvolutions + 1, to, c / 2, c);
      return;
    }
    const DepthwiseSlot slot = depthwise_slot(convolution);
    const int taps = slot.size * slot.size;
    T* to = call_.weights_gradient + slot.source(g.shape, edge);
    std::fill(to, to + taps * c, T(0));
    for (int64_t group = 0; group < g.lanes.groups; ++group) {
      for (int tap = 0; tap < taps; ++tap) {
        const Vec<T> total = over_chunks([&](int64_t chunk) {
          return tap_sums(chunk)[slot.offset() * g.lanes.groups + group * taps + tap];
        });
        add_lanes(g.lanes, g.lanes.together, group, total, to + tap * c);
      }
    }
    matrix(convolution, call_.weights_gradient + g.shape.pointwise() +
                            (edge * kConvolutions + convolution) * c * c, 0, c);
  }

  // Coefficients of the gradient through the pools of a state, from all edges that leave it.
  void settle_pools(int s) {
    const auto& g = geometry_;
    const int64_t channels = g.lanes.channels;
    for (int average = 0; average < 2; ++average) {
      std::fill(pair_sum_, pair_sum_ + channels, 0.0);
      std::fill(pair_product_, pair_product_ + channels, 0.0);
      for (int target = std::max(2, s + 1); target < kStates; ++target) {
        const int edge = edge_of(s, target);
        if (!call_.live[edge][kMaxPool + average]) continue;
        const double factor = double(weight(edge, kMaxPool + average));
        const double* product = pool_totals_ + (edge * 2 + average) * channels;
        for (int64_t c = 0; c < channels; ++c) {
          pair_sum_[c] += factor * node_totals_[target - 2][c];
          pair_product_[c] += factor * product[c];
        }
      }
      store_coefficients(1.0, call_.shape.pool_statistics(s, average), pair_sum_, pair_product_,
                         pool_coefficients_[s][average]);
    }
  }

  void pool_gradient(int s, int64_t block, int64_t thread) {
    if (!pools_alive(call_.live, s)) return;
    const auto& g = geometry_;
    const Scratch own = scratch(thread);
    Vec<T>* mixed = own.gradient;
    for (int average = 0; average < 2; ++average) {
      Vec<T>* to = mixed + average * g.per_block(g.node_pixels);
      std::fill(to, to + g.per_block(g.node_pixels), Vec<T>::zero());
      for (int target = std::max(2, s + 1); target < kStates; ++target) {
        const int edge = edge_of(s, target);
        if (!call_.live[edge][kMaxPool + average]) continue;
        const Vec<T> factor = Vec<T>::splat(weight(edge, kMaxPool + average));
        const Vec<T>* gradient = node_gradients_[target - 2] + node_block(block);
        for (int64_t x = 0; x < g.per_block(g.node_pixels); ++x) to[x] += factor * gradient[x];
      }
      gradient_of(pool_coefficients_[s][average], block, to, pools_[s][average] + node_block(block),
                  0, g.node_pixels, to);
    }
    for (int64_t group = 0; group < g.lanes.groups; ++group) {
      const int64_t plane = (block * g.lanes.groups + group) * g.state_pixels(s);
      for (int64_t y = 0; y < g.node_height; ++y) {
        const int64_t row = group * g.node_pixels + y * g.node_width;
        pool_row_gradient(states_[s] + plane, g.state_height(s), g.state_width(s), g.stride(s), y,
                          pools_[s][0] + node_block(block) + row, mixed + row,
                          mixed + g.per_block(g.node_pixels) + row, gradients_[s] + plane);
      }
    }
  }

  // The gradients of the two preprocessed inputs, channels last.
  void complete_inputs() {
    const auto& g = geometry_;
    for (int s = 0; s < 2; ++s) settle_pools(s);
    parallel(pool_, 2 * g.chunks.count, [&](int64_t unit, int64_t thread) {
      const int s = int(unit % 2);
      const int64_t channels = g.shape.channels;
      const Images<T> to{state_gradients_ + s * g.shape.images * g.pixels * channels,
                         g.pixels * channels, channels};
      for_blocks(unit / 2, [&](int64_t block) {
        pool_gradient(s, block, thread);
        if (g.shape.partial > 1) complete_bypass(s, block, passed_ + thread * passed_size_, to.at);
        const Vec<T>* planes = gradients_[s] + block * g.per_block(g.pixels);
        scatter(g.lanes, block, planes, g.pixels, g.pixels, to);
        if (!call_.training) return;
        for (int64_t n = 0; n < g.lanes.images_of(block); ++n) {
          preprocess_.add_up(call_, state_gradients_, s, block * g.lanes.together + n);
        }
      });
    });
  }

  // Writes all channels of the gradient of an input's state: the mixed ones are still zero.
  void complete_bypass(int s, int64_t block, T* row, T* to) {
    const auto& g = geometry_;
    const int64_t channels = g.shape.channels;
    const PassedRow<T> passed_row(g, g.node_width);
    Vec<T> products[kStates];
    for (auto& product : products) product = Vec<T>::zero();
    for (int64_t n = 0; n < g.lanes.images_of(block); ++n) {
      const int64_t image = block * g.lanes.together + n;
      const T* state = call_.states + (s * g.shape.images + image) * g.pixels * channels;
      T* gradient = to + image * g.pixels * channels;
      const bool halved = g.stride(s) == 2;
      T* pooled = pooled_ + (s * g.shape.images + image) * g.node_pixels * channels;
      if (halved) pool_passing(g, passed_row.start, state, pooled);
      for (int64_t y = 0; y < g.node_height; ++y) {
        T* out = halved ? row : gradient + y * g.node_width * channels;
        send_back(s, image, y, {nullptr, 0, 0}, products, out);
        if (halved) unpool_row(g, passed_row.start, state, y, row, gradient);
      }
    }
    keep_products(s, block, products);
  }

  void merge_pairs(const Vec<T>* pairs) {
    const auto& g = geometry_;
    std::fill(pair_sum_, pair_sum_ + g.lanes.channels, 0.0);
    std::fill(pair_product_, pair_product_ + g.lanes.channels, 0.0);
    for (int64_t block = 0; block < g.lanes.blocks; ++block) {
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        const Vec<T>* pair = pairs + (block * g.lanes.groups + group) * 2;
        add_lanes(g.lanes, g.lanes.images_of(block), group, pair[0], pair_sum_);
        add_lanes(g.lanes, g.lanes.images_of(block), group, pair[1], pair_product_);
      }
    }
  }

  void merge_bypass() {
    const auto& g = geometry_;
    for (int edge = 0; edge < kEdges; ++edge) {
      double total = 0;
      for (int64_t block = 0; g.shape.partial > 1 && block < g.lanes.blocks; ++block) {
        total += double(sum(bypass_sums_[edge * g.lanes.blocks + block], 0, kLanes));
      }
      call_.bypass_gradient[edge] = T(total);
    }
  }

  const CellBackward<T>& call_;
  const ThreadPool& pool_;
  Geometry<T> geometry_;
  Arena arena_;
  EdgeWeights<T> weights_;
  Preprocess<T> preprocess_;
  Vec<T>* states_[kSources];                   // [block][group][pixel]
  Vec<T>* gradients_[kSources];                // of the mixed channels of the states
  Vec<T>* pools_[kSources][2];
  Vec<T>* pool_coefficients_[kSources][2];
  Vec<T>* node_gradients_[kNodes];
  Vec<T>* node_sums_[kNodes];                  // [block][group]
  double* node_totals_[kNodes];                // [channel]
  double* pool_totals_;                        // [edge][maximum, average][channel]
  Vec<T>* bypass_sums_;                        // [edge][block]
  // Of the edge at hand:
  const Vec<T>* outputs_[kSlots];              // as the forward pass kept them
  Vec<T>* between_gradients_[2];               // between the convolutions of the separable ones
  Vec<T>* sums_[kSums];                        // [block][group], pairs for the first convolutions
  Vec<T>* coefficients_[kSlots];
  Vec<T>* taps_;                               // weight gradients, by chunk
  Vec<T>* matrices_;
  T* state_gradients_;                         // [2, N, H, W, C]
  T* rest_gradients_[kNodes];                  // of what passed the edges by [N, h, w, C]
  double *merged_, *pair_sum_, *pair_product_;
  int64_t scratch_size_, passed_size_;
  Vec<T>* scratch_;                            // a thread's own
  T* passed_;
  T* pooled_;                                  // what passes from the inputs under stride 2
};

}  // namespace nas::NAS_ISA
