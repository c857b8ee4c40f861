// The forward pass of a cell.
//
// Batch normalisation makes every convolution a barrier: statistics of the whole batch come before
// the first normalised number. So an edge takes three passes over the blocks: the convolutions of its
// input, with their sums; the second convolutions of the separable ones; and one pass that
// normalises, weights and adds everything to the node.

#pragma once

#include "edge.h"
#include "forward_bypass.h"
#include "preprocess.h"

namespace nas::NAS_ISA {

// Images and planes in S, arithmetic in T.
template <typename S, typename T>
class ForwardCell {
 public:
  ForwardCell(const CellForward<S, T>& call, const ThreadPool& pool, void* workspace)
      : call_(call), pool_(pool), geometry_(call.shape), arena_(workspace),
        weights_(call.shape, geometry_.lanes, arena_, true, false),
        preprocess_(call.shape, pool.threads, arena_, false),
        bypass_(call, geometry_, pool, arena_) {
    const auto& g = geometry_;
    for (int s = 0; s < kSources; ++s) {
      states_[s] = arena_.take<Sixteen<S>>(g.state_planes(s));
      for (auto& pool_planes : pools_[s]) {
        pool_planes = arena_.take<Sixteen<S>>(g.node_planes());
      }
    }
    for (auto& planes : outputs_) planes = arena_.take<Sixteen<S>>(g.node_planes());
    sum_ = arena_.take<Vec<T>>(g.node_planes());
    const int64_t planes = g.lanes.blocks * g.lanes.groups;
    for (auto& moments : moments_) moments = arena_.take<Moments<T>>(planes);
    for (auto& state : pool_moments_) {
      for (auto& moments : state) moments = arena_.take<Moments<T>>(planes);
    }
    between_ = arena_.take<Vec<T>>(2 * 2 * g.lanes.groups);
    coefficients_ = arena_.take<Vec<T>>((kOperations + 1) * g.lanes.groups);
    merged_ = arena_.take<double>(2 * g.shape.channels);
    rectified_size_ = g.rectified_size();
    between_size_ = g.between(nullptr).size();
    const int64_t rows = g.lanes.groups * g.node_width;
    row_size_ = std::max(rows, 2 * g.width) + (kRounded<S, T> ? 2 * rows : rows);
    rectified_ = arena_.take<Vec<T>>(pool.threads * rectified_size_);
    second_ = arena_.take<Vec<T>>(pool.threads * between_size_);
    rows_ = arena_.take<Vec<T>>(pool.threads * row_size_);
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
      if (call_.kept) clear_dead(int(edge), int(edge) - first_edge(target), target);
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

  // Edge by edge, since the planes of one edge stay in the third cache from pass to pass and those
  // of all edges do not.
  void make_node(int target) {
    const auto& g = geometry_;
    make_pools(target);
    const auto over_chunks = [&](auto&& pass) {
      parallel(pool_, g.chunks.count, [&](int64_t chunk, int64_t thread) {
        pass(chunk, thread);
        finish_streaming();
      });
    };
    for (int s = 0; s < target; ++s) {
      const bool* live = call_.live[edge_of(s, target)];
      place_kept(s, target);
      over_chunks([&](int64_t chunk, int64_t thread) { first_pass(s, target, chunk, thread); });
      settle_first(s, target);
      if (live[kSep3] || live[kSep5]) {
        over_chunks([&](int64_t chunk, int64_t thread) { second_pass(s, target, chunk, thread); });
      }
      for (int k = 0; k < 2; ++k) {
        if (!live[kSecond[k].operation]) continue;
        settle(moments_[k], statistics(s, target, kSecond[k].convolution));
      }
      prepare_sum(s, target);
      over_chunks([&](int64_t chunk, int64_t thread) {
        for_blocks(chunk, [&](int64_t block) {
          add_edge(s, target, block);
          if (s == target - 1) write_node(target, block, thread);
        });
      });
    }
  }

  // What is not computed is not kept either, but equal calls shall give equal tensors.
  void clear_dead(int edge, int s, int target) {
    const Kept<T> kept(geometry_);
    const bool* live = call_.live[edge];
    const auto clear = [&](int64_t offset) {
      Sixteen<S>* planes = reinterpret_cast<Sixteen<S>*>(call_.kept) + offset;
      std::fill(planes, planes + geometry_.node_planes(), Sixteen<S>{});
    };
    for (const Branch* branches : {kFirst, kFirst + 2, kSecond}) {
      for (int k = 0; k < 2; ++k) {
        const int convolution = branches[k].convolution;
        if (!live[branches[k].operation] && kept.has(convolution)) {
          clear(kept.convolution(edge, convolution));
        }
      }
    }
    if (geometry_.stride(s) == 2 && !live[kSkip]) clear(kept.reduced(reducing_slot(s, target)));
  }

  // Pools of the states that no edge has left yet.
  void make_pools(int target) {
    const int first = target == 2 ? 0 : target - 1, count = target - first;
    parallel(pool_, geometry_.chunks.count * count, [&](int64_t unit, int64_t thread) {
      const int s = first + int(unit % count);
      if (pools_alive(call_.live, s)) pool_pass(s, unit / count, thread);
    });
    for (int s = first; s < target; ++s) {
      for (int average = 0; average < 2; ++average) {
        if (!pool_alive(call_.live, s, average)) continue;
        settle(pool_moments_[s][average], call_.shape.pool_statistics(s, average));
      }
    }
  }

  // Where copies of an edge's convolutions go for the backward pass.
  void place_kept(int s, int target) {
    if (!call_.kept) return;
    const int edge = edge_of(s, target);
    const Kept<T> kept(geometry_);
    Sixteen<S>* planes = reinterpret_cast<Sixteen<S>*>(call_.kept);
    for (int k = 0; k < 4; ++k) {
      const int convolution = last_convolution(kFirst[k].operation);
      kept_[k] = kept.has(convolution) ? planes + kept.convolution(edge, convolution) : nullptr;
    }
    for (int k = 0; k < 2; ++k) {
      first_kept_[k] = planes + kept.convolution(edge, kFirst[k].convolution);
    }
    if (geometry_.stride(s) == 2) {
      kept_[kReduced] = planes + kept.reduced(reducing_slot(s, target));
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
        Sixteen<S>* out = outputs_[k] + block * g.per_block(g.node_pixels);
        Sixteen<S>* kept = k < 2 ? first_kept_[k] : kept_[k];
        convolve(Depthwise<T>::choose(kFirst[k].size, kFirst[k].dilation, int(g.stride(s))),
                 weights_.pointwise(), input, weights_.taps(edge, kFirst[k].convolution),
                 weights_.matrix(edge, kFirst[k].convolution), g.node_height, g.node_width, row,
                 nullptr, out, [&](int64_t y) { finish_row(moments_[k], block, out, y, kept); });
      }
      if (reducing) {
        const int slot = reducing_slot(s, target);
        Sixteen<S>* out = outputs_[kReduced] + block * g.per_block(g.node_pixels);
        reduce(weights_.pointwise(), g.lanes, input, weights_.reduce(slot, 0), weights_.reduce(slot, 1),
               g.node_height, g.node_width, row, out,
               [&](int64_t y) { finish_row(moments_[kReduced], block, out, y, kept_[kReduced]); });
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
        const Sixteen<S>* plane =
            states_[s] + (block * g.lanes.groups + group) * g.state_pixels(s);
        for (int64_t y = 0; y < g.node_height; ++y) {
          const int64_t row = at + group * g.node_pixels + y * g.node_width;
          pool_row(plane, g.state_height(s), g.state_width(s), g.stride(s), y, largest, total,
                   pools_[s][0] + row, pools_[s][1] + row);
        }
      }
      for (int average = 0; average < 2; ++average) {
        for (int64_t y = 0; y < g.node_height; ++y) {
          finish_row(pool_moments_[s][average], block, pools_[s][average] + at, y, nullptr);
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
    Vec<T>* row = rows_ + thread * row_size_;
    for_blocks(chunk, [&](int64_t block) {
      for (int k = 0; k < 2; ++k) {
        if (!live[kSecond[k].operation]) continue;
        const int64_t at = block * g.per_block(g.node_pixels);
        Sixteen<S>* planes = outputs_[k] + at;
        const Vec<T>* scale = between_ + k * 2 * g.lanes.groups;
        normalise_and_rectify(outputs_[k] + at, scale, scale + g.lanes.groups, input);
        convolve(Depthwise<T>::choose(kSecond[k].size, 1, 1), weights_.pointwise(), input,
                 weights_.taps(edge, kSecond[k].convolution),
                 weights_.matrix(edge, kSecond[k].convolution), g.node_height, g.node_width, row,
                 nullptr, planes,
                 [&](int64_t y) { finish_row(moments_[k], block, planes, y, kept_[k]); });
      }
    });
  }

  // A row of a block of `planes` is there: its sums and, past the caches, a copy to keep.
  void finish_row(Moments<T>* moments, int64_t block, const Sixteen<S>* planes, int64_t y,
                  Sixteen<S>* kept) {
    const auto& g = geometry_;
    for (int64_t group = 0; group < g.lanes.groups; ++group) {
      const int64_t at = group * g.node_pixels + y * g.node_width;
      moments[block * g.lanes.groups + group].add_row(planes + at, g.node_width, y == 0);
      if (!kept) continue;
      Sixteen<S>* to = kept + block * g.per_block(g.node_pixels) + at;
      for (int64_t x = 0; x < g.node_width; ++x) stream(to + x, planes[at + x]);
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
      settle(moments_[k], at);
      if (k >= 2) continue;
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        const Vec<T> scale = in_lanes<T>(g.lanes, call_.reciprocal_deviation + at, group);
        const Vec<T> mean = in_lanes<T>(g.lanes, call_.mean + at, group);
        Vec<T>* to = between_ + k * 2 * g.lanes.groups + group;
        to[0] = scale;
        to[g.lanes.groups] = Vec<T>::zero() - mean * scale;
      }
    }
    if (live[kSkip] && g.stride(s) == 2) {
      settle(moments_[kReduced], call_.shape.reduce_statistics(reducing_slot(s, target)));
    }
  }

  // What an edge adds to its node is a linear combination of planes: lists them with their
  // coefficients.
  void prepare_sum(int s, int target) {
    const auto& g = geometry_;
    const int edge = edge_of(s, target);
    const bool* live = call_.live[edge];
    terms_ = 0;
    Vec<T>* bias = coefficients_ + kOperations * g.lanes.groups;
    std::fill(bias, bias + g.lanes.groups, Vec<T>::zero());
    const auto add = [&](int operation, const Sixteen<S>* planes, int64_t at) {
      const Vec<T> weight = Vec<T>::splat(call_.operations[edge * kOperations + operation]);
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        Vec<T>& coefficient = coefficients_[terms_ * g.lanes.groups + group];
        coefficient = weight;
        if (at < 0) continue;
        coefficient = weight * in_lanes<T>(g.lanes, call_.reciprocal_deviation + at, group);
        bias[group] = bias[group] - coefficient * in_lanes<T>(g.lanes, call_.mean + at, group);
      }
      planes_[terms_++] = planes;
    };
    for (int average = 0; average < 2; ++average) {
      if (!live[kMaxPool + average]) continue;
      add(kMaxPool + average, pools_[s][average], call_.shape.pool_statistics(s, average));
    }
    if (live[kSkip] && g.stride(s) == 1) {
      add(kSkip, states_[s], -1);
    } else if (live[kSkip]) {
      add(kSkip, outputs_[kReduced], call_.shape.reduce_statistics(reducing_slot(s, target)));
    }
    for (int k = 0; k < 4; ++k) {
      const int operation = kFirst[k].operation;
      if (!live[operation]) continue;
      add(operation, outputs_[k], statistics(s, target, last_convolution(operation)));
    }
  }

  // The mixed channels of a node: where all of them are mixed, they are a state as they are, unless
  // that is rounded.
  Vec<T>* node_planes(int target, int64_t block) const {
    Vec<T>* planes = sum_;
    if constexpr (!kRounded<S, T>) {
      if (geometry_.shape.partial == 1 && target < kSources) planes = states_[target];
    }
    return planes + block * geometry_.per_block(geometry_.node_pixels);
  }

  void add_edge(int s, int target, int64_t block) {
    const auto& g = geometry_;
    for (int64_t group = 0; group < g.lanes.groups; ++group) {
      const int64_t at = block * g.per_block(g.node_pixels) + group * g.node_pixels;
      Vec<T>* to = node_planes(target, block) + group * g.node_pixels;
      const Vec<T> bias = coefficients_[kOperations * g.lanes.groups + group];
      for_columns<kPixels>(0, g.node_pixels, [&](auto pixels, int64_t x) NAS_INLINED {
        constexpr int count = decltype(pixels)::value;
        Vec<T> sum[count];
        NAS_UNROLL for (int i = 0; i < count; ++i) sum[i] = s == 0 ? bias : to[x + i] + bias;
        for (int term = 0; term < terms_; ++term) {
          const Vec<T> coefficient = coefficients_[term * g.lanes.groups + group];
          const Sixteen<S>* from = planes_[term] + at + x;
          NAS_UNROLL for (int i = 0; i < count; ++i) sum[i] += coefficient * widen(from[i]);
        }
        NAS_UNROLL for (int i = 0; i < count; ++i) to[x + i] = sum[i];
      });
    }
  }

  // All edges have added to a node: where it goes.
  void write_node(int target, int64_t block, int64_t thread) {
    const auto& g = geometry_;
    const int64_t channels = g.shape.channels, width = g.node_width;
    const Images<S> node{call_.output + (target - 2) * channels, g.node_pixels * kNodes * channels,
                         kNodes * channels};
    Vec<T>* planes = node_planes(target, block);
    Sixteen<S>* state = target < kSources
                            ? states_[target] + block * g.per_block(g.node_pixels)
                            : nullptr;
    if (g.shape.partial == 1) {
      scatter(g.lanes, block, planes, g.node_pixels, g.node_pixels, node);
      if (!kRounded<S, T> || !state) return;
      return gather(g.lanes, block, Images<const S>{node.at, node.image, node.pixel}, g.node_pixels,
                    state, g.node_pixels);
    }
    for (int64_t y = 0; y < g.node_height; ++y) {
      bypass_.write_row(target, block, y, planes + y * width, node,
                        state ? state + y * width : nullptr, thread);
    }
  }

  void gather_state(int s, int64_t block) {
    const auto& g = geometry_;
    const Images<const S> from{call_.states + s * g.shape.images * g.pixels * g.shape.channels,
                               g.pixels * g.shape.channels, g.shape.channels};
    gather(g.lanes, block, from, g.pixels, states_[s] + block * g.per_block(g.pixels), g.pixels);
    if (g.shape.partial > 1 && g.stride(s) == 2) bypass_.pool_input(s, block, from);
  }

  template <typename F>
  void for_blocks(int64_t chunk, F&& f) {
    for (int64_t b = geometry_.chunks.begin(chunk); b < geometry_.chunks.end(chunk); ++b) f(b);
  }

  static constexpr int kReduced = 4;  // after the four kinds of convolution

  const CellForward<S, T>& call_;
  const ThreadPool& pool_;
  Geometry<T> geometry_;
  Arena arena_;
  EdgeWeights<T> weights_;
  Preprocess<S, T> preprocess_;
  BypassForward<S, T> bypass_;
  Sixteen<S>* states_[kSources];     // [block][group][pixel]
  Sixteen<S>* pools_[kSources][2];       // of each state: maximum, average
  // Of the edge at hand:
  // Convolutions before their normalisation, a second one in the place of the first; the last is the
  // skip that reduces. And where copies of them, and of the first ones, are kept, or null.
  Sixteen<S>* outputs_[5];
  Sixteen<S>*kept_[5] = {}, *first_kept_[2] = {};
  Moments<T>* moments_[5];
  Vec<T>* between_;                  // scale and shift between two convolutions
  Vec<T>* coefficients_;
  const Sixteen<S>* planes_[kOperations];
  int terms_ = 0;
  Vec<T>* sum_;                      // a node at hand that is not a state
  Moments<T>* pool_moments_[kSources][2];
  double* merged_;
  int64_t rectified_size_, between_size_, row_size_;
  Vec<T>*rectified_, *second_, *rows_;  // a thread's own
};

}  // namespace nas::NAS_ISA
