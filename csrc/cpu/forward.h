// The forward pass of a cell.
//
// Batch normalisation makes every convolution a barrier: statistics of the whole batch come before
// the first normalised number. So a node takes three passes over the blocks, for all of its edges at
// once: the convolutions of its inputs, with their sums; the second convolutions of the separable
// ones; and one pass that normalises, weights and adds up everything into the node.

#pragma once

#include "bypass.h"
#include "edge.h"
#include "preprocess.h"

namespace nas::NAS_ISA {

template <typename T>
class ForwardCell {
 public:
  ForwardCell(const CellForward<T>& call, const ThreadPool& pool, void* workspace)
      : call_(call), pool_(pool), geometry_(call.shape), arena_(workspace),
        weights_(call.shape, geometry_.lanes, arena_, false),
        preprocess_(call.shape, pool.threads, arena_, false) {
    const auto& g = geometry_;
    for (int s = 0; s < kSources; ++s) {
      states_[s] = arena_.take<Vec<T>>(g.state_planes(s));
      for (auto& pool_planes : pools_[s]) pool_planes = arena_.take<Vec<T>>(g.node_planes());
    }
    for (auto& edge : spare_) {
      for (auto& planes : edge) planes = arena_.take<Vec<T>>(call.kept ? 0 : g.node_planes());
    }
    const int64_t planes = g.lanes.blocks * g.lanes.groups;
    for (auto& edge : moments_) {
      for (auto& moments : edge) moments = arena_.take<Moments<T>>(planes);
    }
    for (auto& source : pool_moments_) {
      for (auto& moments : source) moments = arena_.take<Moments<T>>(planes);
    }
    for (auto& edge : between_) edge = arena_.take<Vec<T>>(2 * 2 * g.lanes.groups);
    coefficients_ = arena_.take<Vec<T>>((kSources * kOperations + 1) * g.lanes.groups);
    merged_ = arena_.take<double>(2 * g.shape.channels);
    rectified_size_ = g.rectified_size();
    between_size_ = g.between(nullptr).size();
    const int64_t rows = g.lanes.groups * g.node_width;
    row_size_ = std::max(rows, 2 * g.width) + rows;
    passed_size_ = g.shape.partial > 1 ? g.node_width * g.shape.channels : 0;
    rectified_ = arena_.take<Vec<T>>(pool.threads * rectified_size_);
    second_ = arena_.take<Vec<T>>(pool.threads * between_size_);
    rows_ = arena_.take<Vec<T>>(pool.threads * row_size_);
    passed_ = arena_.take<T>(pool.threads * passed_size_);
    const bool halves = g.shape.partial > 1 && g.shape.reduction;
    pooled_ = arena_.take<T>(halves ? 2 * g.shape.images * g.node_pixels * g.shape.channels : 0);
  }

  int64_t workspace_bytes() const { return arena_.used(); }

  void run() {
    std::fill(rectified_, rectified_ + pool_.threads * rectified_size_, Vec<T>::zero());
    std::fill(second_, second_ + pool_.threads * between_size_, Vec<T>::zero());
    keep_running_statistics();
    parallel(pool_, kEdges, [&](int64_t edge, int64_t) {
      int target = 2;
      while (first_edge(target + 1) <= edge) ++target;
      weights_.pack(call_.weights, int(edge), int(edge) - first_edge(target), target);
    });
    preprocess_.forward(call_, pool_, merged_, [&](int s, int64_t chunk) {
      for_blocks(chunk, [&](int64_t block) { gather_state(s, block); });
    });
    for (int target = 2; target < kStates; ++target) make_node(target);
  }

 private:
  // What is not computed keeps the statistics it had.
  void keep_running_statistics() {
    for (int64_t i = 0; i < call_.shape.statistics(); ++i) {
      call_.mean[i] = call_.running_mean[i];
      call_.variance[i] = call_.running_variance[i];
      call_.reciprocal_deviation[i] = T(1 / std::sqrt(double(call_.running_variance[i]) + kEpsilon));
    }
  }

  void make_node(int target) {
    const int sources = target;                       // one edge from each state before
    const int fresh = target == 2 ? 0 : target - 1;   // states whose pools are still to be made
    const int fresh_pools = target - fresh;
    const auto& g = geometry_;
    for (int s = 0; s < sources; ++s) place_outputs(s, target);

    parallel(pool_, g.chunks.count * (sources + fresh_pools), [&](int64_t unit, int64_t thread) {
      const int job = int(unit % (sources + fresh_pools));
      const int64_t chunk = unit / (sources + fresh_pools);
      if (job < sources) {
        first_pass(job, target, chunk, thread);
      } else if (pools_alive(call_.live, fresh + job - sources)) {
        pool_pass(fresh + job - sources, chunk, thread);
      }
    });
    for (int s = fresh; s < target; ++s) {
      for (int average = 0; average < 2; ++average) {
        if (!pool_alive(call_.live, s, average)) continue;
        settle(pool_moments_[s][average], call_.shape.pool_statistics(s, average));
      }
    }
    for (int s = 0; s < sources; ++s) settle_first(s, target);

    parallel(pool_, g.chunks.count * sources, [&](int64_t unit, int64_t thread) {
      second_pass(int(unit % sources), target, unit / sources, thread);
    });
    for (int s = 0; s < sources; ++s) {
      const bool* live = call_.live[edge_of(s, target)];
      for (int k = 0; k < 2; ++k) {
        if (!live[kSecond[k].operation]) continue;
        settle(moments_[s][k], statistics(s, target, kSecond[k].convolution));
      }
    }

    prepare_sum(target);
    parallel(pool_, g.chunks.count, [&](int64_t chunk, int64_t thread) {
      for_blocks(chunk, [&](int64_t block) { sum_node(target, block, thread); });
    });
  }

  // Where the convolutions of an edge go: kept for the backward pass, or into spare memory, where a
  // second convolution takes the place of the first.
  void place_outputs(int s, int target) {
    const int edge = edge_of(s, target);
    for (int k = 0; k < 5; ++k) outputs_[s][k] = spare_[s][k];
    for (int k = 0; k < 2; ++k) first_outputs_[s][k] = spare_[s][k];
    if (!call_.kept) return;
    const Kept<T> kept(geometry_);
    Vec<T>* planes = reinterpret_cast<Vec<T>*>(call_.kept);
    for (int k = 0; k < 4; ++k) {
      outputs_[s][k] = planes + kept.convolution(edge, last_convolution(kFirst[k].operation));
    }
    for (int k = 0; k < 2; ++k) {
      first_outputs_[s][k] = planes + kept.convolution(edge, kFirst[k].convolution);
    }
    if (geometry_.stride(s) == 2) {
      outputs_[s][kReduced] = planes + kept.reduced(reducing_slot(s, target));
    }
  }

  int64_t statistics(int source, int target, int convolution) const {
    return call_.shape.convolution_statistics(edge_of(source, target), convolution);
  }

  void first_pass(int s, int target, int64_t chunk, int64_t thread) {
    const auto& g = geometry_;
    const int edge = edge_of(s, target);
    const bool* live = call_.live[edge];
    const bool reducing = live[kSkip] && g.stride(s) == 2;
    if (!any_first(live) && !reducing) return;
    const Padded<T> input = g.rectified(rectified_ + thread * rectified_size_, s);
    Vec<T>* row = rows_ + thread * row_size_;
    for_blocks(chunk, [&](int64_t block) {
      rectify(states_[s] + block * g.per_block(g.state_pixels(s)), input);
      for (int k = 0; k < 4; ++k) {
        if (!live[kFirst[k].operation]) continue;
        Vec<T>* out =
            (k < 2 ? first_outputs_[s][k] : outputs_[s][k]) + block * g.per_block(g.node_pixels);
        convolve(Depthwise<T>::choose(kFirst[k].size, kFirst[k].dilation, int(g.stride(s))),
                 weights_.pointwise(), input, weights_.taps(edge, kFirst[k].convolution),
                 weights_.matrix(edge, kFirst[k].convolution), g.node_height, g.node_width,
                 row, out, [&](int64_t y) { add_moments(moments_[s][k], block, out, y); });
      }
      if (reducing) {
        const int slot = reducing_slot(s, target);
        Vec<T>* out = outputs_[s][kReduced] + block * g.per_block(g.node_pixels);
        reduce(weights_.pointwise(), g.lanes, input, weights_.reduce(slot, 0), weights_.reduce(slot, 1),
               g.node_height, g.node_width, row, out,
               [&](int64_t y) { add_moments(moments_[s][kReduced], block, out, y); });
      }
    });
  }

  void pool_pass(int s, int64_t chunk, int64_t thread) {
    const auto& g = geometry_;
    Vec<T>* largest = rows_ + thread * row_size_;
    Vec<T>* total = largest + g.state_width(s);
    for_blocks(chunk, [&](int64_t block) {
      const int64_t at = block * g.per_block(g.node_pixels);
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        const Vec<T>* plane =
            states_[s] + (block * g.lanes.groups + group) * g.state_pixels(s);
        for (int64_t y = 0; y < g.node_height; ++y) {
          const int64_t row = at + group * g.node_pixels + y * g.node_width;
          pool_row(plane, g.state_height(s), g.state_width(s), g.stride(s), y, largest, total,
                   pools_[s][0] + row, pools_[s][1] + row);
        }
      }
      for (int average = 0; average < 2; ++average) {
        for (int64_t y = 0; y < g.node_height; ++y) {
          add_moments(pool_moments_[s][average], block, pools_[s][average] + at, y);
        }
      }
    });
  }

  void second_pass(int s, int target, int64_t chunk, int64_t thread) {
    const auto& g = geometry_;
    const int edge = edge_of(s, target);
    const bool* live = call_.live[edge];
    if (!live[kSep3] && !live[kSep5]) return;
    const Padded<T> input = g.between(second_ + thread * between_size_);
    for_blocks(chunk, [&](int64_t block) {
      for (int k = 0; k < 2; ++k) {
        if (!live[kSecond[k].operation]) continue;
        const int64_t at = block * g.per_block(g.node_pixels);
        Vec<T>* planes = outputs_[s][k] + at;
        const Vec<T>* scale = between_[s] + k * 2 * g.lanes.groups;
        normalise_and_rectify(first_outputs_[s][k] + at, scale, scale + g.lanes.groups, input);
        convolve(Depthwise<T>::choose(kSecond[k].size, 1, 1), weights_.pointwise(), input,
                 weights_.taps(edge, kSecond[k].convolution),
                 weights_.matrix(edge, kSecond[k].convolution), g.node_height, g.node_width,
                 rows_ + thread * row_size_, planes,
                 [&](int64_t y) { add_moments(moments_[s][k], block, planes, y); });
      }
    });
  }

  void add_moments(Moments<T>* moments, int64_t block, const Vec<T>* planes, int64_t y) {
    const auto& g = geometry_;
    for (int64_t group = 0; group < g.lanes.groups; ++group) {
      moments[block * g.lanes.groups + group].add_row(
          planes + group * g.node_pixels + y * g.node_width, g.node_width, y == 0);
    }
  }

  // Mean and deviation of one normalisation, from the batch if it trains.
  void settle(const Moments<T>* moments, int64_t at) {
    if (!call_.training) return;
    const int64_t channels = geometry_.lanes.channels;
    double *mean = merged_, *variance = merged_ + channels;
    merge_moments(geometry_.lanes, moments, geometry_.node_pixels, mean, variance);
    store_statistics(call_, at, channels, call_.shape.images * geometry_.node_pixels, mean,
                     variance);
  }

  void settle_first(int s, int target) {
    const auto& g = geometry_;
    const bool* live = call_.live[edge_of(s, target)];
    for (int k = 0; k < 4; ++k) {
      if (!live[kFirst[k].operation]) continue;
      const int64_t at = statistics(s, target, kFirst[k].convolution);
      settle(moments_[s][k], at);
      if (k >= 2) continue;
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        const Vec<T> scale = in_lanes<T>(g.lanes, call_.reciprocal_deviation + at, group);
        const Vec<T> mean = in_lanes<T>(g.lanes, call_.mean + at, group);
        Vec<T>* to = between_[s] + k * 2 * g.lanes.groups + group;
        to[0] = scale;
        to[g.lanes.groups] = Vec<T>::zero() - mean * scale;
      }
    }
    if (live[kSkip] && g.stride(s) == 2) {
      settle(moments_[s][kReduced], call_.shape.reduce_statistics(reducing_slot(s, target)));
    }
  }

  // The node is one linear combination of planes: lists them with their coefficients.
  void prepare_sum(int target) {
    const auto& g = geometry_;
    terms_ = 0;
    Vec<T>* bias = coefficients_ + kSources * kOperations * g.lanes.groups;
    std::fill(bias, bias + g.lanes.groups, Vec<T>::zero());
    for (int s = 0; s < target; ++s) {
      const int edge = edge_of(s, target);
      const bool* live = call_.live[edge];
      const auto add = [&](int operation, const Vec<T>* planes, int64_t at) {
        const Vec<T> weight = Vec<T>::splat(call_.operations[edge * kOperations + operation]);
        for (int64_t group = 0; group < g.lanes.groups; ++group) {
          Vec<T>& coefficient = coefficients_[terms_ * g.lanes.groups + group];
          coefficient = weight;
          if (at < 0) continue;
          coefficient =
              weight * in_lanes<T>(g.lanes, call_.reciprocal_deviation + at, group);
          bias[group] =
              bias[group] - coefficient * in_lanes<T>(g.lanes, call_.mean + at, group);
        }
        planes_[terms_++] = planes;
      };
      for (int average = 0; average < 2; ++average) {
        if (!live[kMaxPool + average]) continue;
        add(kMaxPool + average, pools_[s][average], call_.shape.pool_statistics(s, average));
      }
      if (live[kSkip]) {
        if (g.stride(s) == 1) {
          add(kSkip, states_[s], -1);
        } else {
          add(kSkip, outputs_[s][kReduced],
              call_.shape.reduce_statistics(reducing_slot(s, target)));
        }
      }
      for (int k = 0; k < 4; ++k) {
        const int operation = kFirst[k].operation;
        if (!live[operation]) continue;
        add(operation, outputs_[s][k], statistics(s, target, last_convolution(operation)));
      }
    }
  }

  // Row by row: the weighted sum, and where it goes.
  void sum_node(int target, int64_t block, int64_t thread) {
    const auto& g = geometry_;
    const int64_t channels = g.shape.channels, width = g.node_width;
    Vec<T>* row = rows_ + thread * row_size_;
    for (int64_t y = 0; y < g.node_height; ++y) {
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        const int64_t at = (block * g.lanes.groups + group) * g.node_pixels + y * width;
        add_terms(at, group, row + group * width);
        if (target < kSources && g.shape.partial == 1) {
          std::copy(row + group * width, row + (group + 1) * width, states_[target] + at);
        }
      }
      const Images<T> node{call_.output + (target - 2) * channels,
                           g.node_pixels * kNodes * channels, kNodes * channels};
      if (g.shape.partial == 1) {
        scatter(g.lanes, block, row, width, width, node.skip(y * width));
      } else {
        shuffle_row(target, block, y, row, node, passed_ + thread * passed_size_);
        if (target < kSources) {
          gather(g.lanes, block, Images<const T>{node.at, node.image, node.pixel}.skip(y * width),
                 width, states_[target] + block * g.per_block(g.node_pixels) + y * width,
                 g.node_pixels);
        }
      }
    }
  }

  void add_terms(int64_t at, int64_t group, Vec<T>* row) {
    const auto& g = geometry_;
    const Vec<T> bias = coefficients_[kSources * kOperations * g.lanes.groups + group];
    for_columns<kPixels>(0, g.node_width, [&](auto block, int64_t x) {
      constexpr int count = decltype(block)::value;
      Vec<T> sum[count];
      NAS_UNROLL for (int i = 0; i < count; ++i) sum[i] = bias;
      for (int term = 0; term < terms_; ++term) {
        const Vec<T> coefficient = coefficients_[term * g.lanes.groups + group];
        const Vec<T>* from = planes_[term] + at + x;
        NAS_UNROLL for (int i = 0; i < count; ++i) sum[i] += coefficient * from[i];
      }
      NAS_UNROLL for (int i = 0; i < count; ++i) row[x + i] = sum[i];
    });
  }

  // One row of a node of PC-DARTS: mixed channels, those that pass by, and their shuffle.
  void shuffle_row(int target, int64_t block, int64_t y, const Vec<T>* row, Images<T> node,
                   T* passed) {
    const auto& g = geometry_;
    const int64_t mixed = g.lanes.channels, first = y * g.node_width;
    const PassedRow<T> passed_row(g, g.node_width);
    Images<const T> from[kSources];
    for (int64_t n = 0; n < g.lanes.images_of(block); ++n) {
      const int64_t image = block * g.lanes.together + n;
      for (int s = 0; s < target; ++s) {
        from[s] = passing(g, s, call_.states, call_.output, pooled_);
        from[s].at += image * from[s].image + first * from[s].pixel;
      }
      with_edges(target, [&](auto edges) {
        passed_row.template add_up<edges>(from, call_.bypass + first_edge(target), passed);
      });
      T* to = node.at + image * node.image + first * node.pixel;
      for (int64_t x = 0; x < g.node_width; ++x) {
        const T* lanes = reinterpret_cast<const T*>(row + x) + n * g.lanes.group;
        shuffle(lanes, g.node_width * kLanes, passed + x * g.shape.channels, mixed,
                g.shape.partial, to + x * node.pixel);
      }
    }
  }

  void gather_state(int s, int64_t block) {
    const auto& g = geometry_;
    const Images<const T> from{call_.states + s * g.shape.images * g.pixels * g.shape.channels,
                               g.pixels * g.shape.channels, g.shape.channels};
    gather(g.lanes, block, from, g.pixels, states_[s] + block * g.per_block(g.pixels), g.pixels);
    if (g.shape.partial == 1 || g.stride(s) == 1) return;
    const PassedRow<T> passed_row(g, g.node_width);
    for (int64_t n = 0; n < g.lanes.images_of(block); ++n) {
      const int64_t image = block * g.lanes.together + n;
      pool_passing(g, passed_row.start, from.at + image * from.image,
                   pooled_ + (s * g.shape.images + image) * g.node_pixels * g.shape.channels);
    }
  }

  template <typename F>
  void for_blocks(int64_t chunk, F&& f) {
    for (int64_t b = geometry_.chunks.begin(chunk); b < geometry_.chunks.end(chunk); ++b) f(b);
  }

  static constexpr int kReduced = 4;  // after the four kinds of convolution

  const CellForward<T>& call_;
  const ThreadPool& pool_;
  Geometry<T> geometry_;
  Arena arena_;
  EdgeWeights<T> weights_;
  Preprocess<T> preprocess_;
  Vec<T>* states_[kSources];         // [block][group][pixel]
  Vec<T>* pools_[kSources][2];       // of each state: maximum, average
  Vec<T>* outputs_[kSources][5];     // of the edges into the node at hand, before normalisation
  Vec<T>* first_outputs_[kSources][2];
  Vec<T>* spare_[kSources][5];
  Moments<T>* moments_[kSources][5];
  Moments<T>* pool_moments_[kSources][2];
  Vec<T>* between_[kSources];        // scale and shift between two convolutions
  Vec<T>* coefficients_;
  const Vec<T>* planes_[kSources * kOperations];
  int terms_ = 0;
  double* merged_;
  int64_t rectified_size_, between_size_, row_size_, passed_size_;
  Vec<T>*rectified_, *second_, *rows_;  // a thread's own
  T* passed_;
  T* pooled_;                        // what passes from the inputs under stride 2 [2, N, h, w, C]
};

}  // namespace nas::NAS_ISA
