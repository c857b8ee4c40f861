// The forward pass of a cell: its launches.
//
// A normalisation needs the whole batch before its first number, so convolutions end a launch. Few
// launches do the work of many edges: all edges that leave the two inputs are ready at once, eight
// of the fourteen, and then all that leave the node before. So there are four rounds of what leaves
// the states, first convolutions and pools; second convolutions of the edges into one node; and
// that node.

#pragma once

#include "combine.cuh"
#include "convolve.cuh"
#include "pointwise.cuh"

namespace nas::cuda {

// Does any edge that leaves a state pool it?
inline bool pool_alive(const bool (&live)[kEdges][kOperations], int source, int average) {
  for (int target = larger(2, source + 1); target < kStates; ++target) {
    if (live[edge_of(source, target)][kMaxPool + average]) return true;
  }
  return false;
}
inline bool pools_alive(const bool (&live)[kEdges][kOperations], int source) {
  return pool_alive(live, source, 0) || pool_alive(live, source, 1);
}

// Preprocessing of input `which`.
template <typename T, typename P>
Pointwise<T> preprocessing(const CellShape& shape, const T* before, const T* previous,
                           const P* weights, int which) {
  const int64_t channels = which ? shape.previous_channels : shape.before_channels;
  return {which ? previous : before,
          channels,
          int(channels),
          int(shape.channels),
          !which && shape.previous_reduction ? 2 : 1,
          int(which ? shape.height : shape.before_height),
          int(which ? shape.width : shape.before_width),
          weights + shape.preprocess(which)};
}
// The skip connection that reduces, from an input.
template <typename T, typename P>
Pointwise<T> reduction(const Geometry& g, const T* states, const P* weights, int edge) {
  const int s = source_of(edge);
  return {g.state<const T>(states, nullptr, s).at,
          g.shape.channels,
          g.channels(),
          g.channels(),
          2,
          int(g.shape.height),
          int(g.shape.width),
          weights + reduce_at(g, reducing_slot(s, target_of(edge)))};
}

// The second convolutions of the edges into a node.
inline Jobs second_convolutions(const bool (&live)[kEdges][kOperations], int target) {
  Jobs jobs;
  for (int s = 0; s < target; ++s) {
    const int edge = edge_of(s, target);
    for (const int c : {kSep3B, kSep5B}) {
      if (live[edge][operation_of(c)]) jobs.add(edge, c);
      jobs.close();
    }
  }
  return jobs;
}
// And the dilated ones.
inline void add_dilated(const bool (&live)[kEdges][kOperations], int target, Jobs& jobs) {
  for (int s = 0; s < target; ++s) {
    const int edge = edge_of(s, target);
    for (const int c : {kDilated3, kDilated5}) {
      if (live[edge][operation_of(c)]) jobs.add(edge, c);
    }
    jobs.close();
  }
}
// The first convolutions of an edge.
inline void add_first(const bool (&live)[kEdges][kOperations], int edge, Jobs& jobs) {
  for (const int c : {kSep3A, kSep5A, kDilated3, kDilated5}) {
    if (live[edge][operation_of(c)]) jobs.add(edge, c);
  }
}
// The pools of a state.
inline void add_pools(const bool (&live)[kEdges][kOperations], int s, Jobs& jobs) {
  for (int average = 0; average < 2; ++average) {
    if (pool_alive(live, s, average)) jobs.add(edge_of(s, larger(2, s + 1)), kPooled + average);
  }
}

// All that the states first..last - 1, which have one size, are read for.
inline Jobs leaving(const bool (&live)[kEdges][kOperations], int first, int last) {
  Jobs jobs;
  for (int s = first; s < last; ++s) {
    add_pools(live, s, jobs);
    for (int target = larger(2, s + 1); target < kStates; ++target) {
      add_first(live, edge_of(s, target), jobs);
    }
    jobs.close();
  }
  return jobs;
}

// Calls f with how many channels of those that are not cut into mixed and passing ones are read at
// once, as a constant: V, or 16 bytes where the mixed ones are less.
template <typename T, int V, typename F>
void with_whole(const CellShape& shape, const F& f) {
  if constexpr (V > 1 && V < kWide<T>) {
    const bool wide = shape.channels % kWide<T> == 0 && shape.before_channels % kWide<T> == 0 &&
                      shape.previous_channels % kWide<T> == 0;
    if (wide) return f(std::integral_constant<int, kWide<T>>());
  }
  f(std::integral_constant<int, V>());
}

template <typename T, int V>
class Forward {
 public:
  using P = Sum<T>;

  Forward(const CellForward<T, P>& call, void* workspace, Stream stream)
      : call_(call), g_{call.shape}, stream_(stream), arena_(workspace) {
    kept_ = call.kept ? call.kept : arena_.template take<T>(g_.kept());
    unkept_ = arena_.template take<T>(g_.unkept(kEdges));
    for (auto& pooled : pools_) pooled = arena_.template take<T>(2 * g_.plane());
    // no launch has more groups than Jobs::kMost, or more blocks than that and kBlocks
    const int64_t blocks = kBlocks + Jobs::kMost;
    const int64_t shared = kFromState * smaller(blocks, g_.node_pixels() * 2);
    moments_ = arena_.template take<P>(
        larger(blocks * shape().channels, shared * g_.channels()) * 3);
  }

  int64_t workspace_bytes() const { return arena_.used(); }

  void run() {
    const int64_t statistics = shape().statistics();
    launch(keep_running<P>, {unsigned(divide_up(statistics, kThreads)), 1, 1}, 0, stream_,
           statistics, call_.running_mean, call_.running_variance, call_.mean,
           call_.reciprocal_deviation, call_.variance);
    preprocess();
    for (int target = 2; target < kStates; ++target) {
      const int first = target == 2 ? 0 : target - 1;  // states that have just been made
      convolve_all(leaving(call_.live, first, target));
      reductions(target);
      convolve_all(second_convolutions(call_.live, target));
      make_node(target);
    }
  }

 private:
  const CellShape& shape() const { return call_.shape; }
  const bool* live(int edge) const { return call_.live[edge]; }
  P* moments() const { return call_.training ? moments_ : nullptr; }
  Inputs<T> inputs() const {
    return {g_, call_.states, call_.output, kept_, unkept_,
            0,  call_.mean,   call_.reciprocal_deviation, call_.weights};
  }

  void settle(const Settles& settles) {
    if (!call_.training) return;
    int channels = 0;
    for (int i = 0; i < settles.count; ++i) channels = larger(channels, settles.job[i].channels);
    launch(settle_moments<P>,
           {unsigned(divide_up(channels, kThreads / 32)), unsigned(settles.count), 1}, 0, stream_,
           settles, (const P*)moments_, call_.mean, call_.reciprocal_deviation, call_.variance);
  }

  // kWidth channels at a time.
  template <int kWidth>
  void run_pointwise(PointwiseForward<T>& work, const int64_t* statistics) {
    if (!work.count) return;
    P *in, *out, *staged;
    Moments<P> sums;
    int inputs = 1, outputs = 1;
    for (int i = 0; i < work.count; ++i) {
      inputs = larger(inputs, work.job[i].inputs);
      outputs = larger(outputs, work.job[i].outputs);
    }
    work.rows = pointwise_rows(inputs, outputs);
    work.moments = moments();
    int64_t bytes;
    while ((bytes = work.take(Arena(nullptr), kWidth, &in, &out, &staged, &sums)) > kSharedBytes) {
      if (work.rows == 1) throw std::invalid_argument("a cell has too many channels for a GPU");
      work.rows /= 2;
    }
    const int chunks = chunks_for(divide_up(work.pixels, work.rows), work.count);
    launch(pointwise<T, kWidth>, {unsigned(chunks), unsigned(work.count), 1}, bytes, stream_, work);
    Settles settles;
    for (int i = 0; i < work.count; ++i) {
      const int channels = work.job[i].outputs;
      settles.add({moments_numbers(i * chunks, channels), statistics[i], channels, chunks});
    }
    settle(settles);
  }

  void preprocess() {
    PointwiseForward<T> work;
    work.pixels = g_.input_pixels();
    int64_t statistics[2];
    for (int which = 0; which < 2; ++which) {
      work.job[which] =
          preprocessing(shape(), call_.before, call_.previous, call_.weights, which);
      work.to[which] = call_.states + which * g_.input_pixels() * shape().channels;
      statistics[which] = shape().preprocess_statistics(which);
    }
    work.count = 2;
    with_whole<T, V>(shape(), [&](auto whole) {
      this->template run_pointwise<whole()>(work, statistics);
      launch(normalise_states<T, whole()>,
             {blocks_for(g_.input_pixels() * shape().channels / whole()), 2, 1}, 0, stream_, g_,
             call_.states, (const P*)call_.mean, (const P*)call_.reciprocal_deviation);
    });
  }

  void convolve_all(const Jobs& jobs) {
    if (!jobs.count) return;
    Convolve<T> work{inputs(), jobs, {}, {}, 0, 0, kept_, unkept_, {}, {}, moments()};
    for (int s = 0; s < kSources; ++s) work.pools[s] = pools_[s];
    const int chunks = run_convolve<V>(work, stream_);
    Settles settles;
    for (int i = 0; i < jobs.count; ++i) {
      const int edge = jobs.edge[i], c = jobs.convolution[i];
      settles.add({moments_numbers(i * chunks, g_.channels()),
                   is_pool(c) ? shape().pool_statistics(source_of(edge), c - kPooled)
                              : shape().convolution_statistics(edge, c),
                   g_.channels(), chunks});
    }
    settle(settles);
  }

  // All of the skip connections that reduce, in the first round.
  void reductions(int target) {
    if (target != 2 || !shape().reduction) return;
    PointwiseForward<T> work;
    work.pixels = g_.node_pixels();
    int64_t statistics[kReducing];
    for (int slot = 0; slot < kReducing; ++slot) {
      const int edge = edge_of(slot % 2, 2 + slot / 2);
      if (!live(edge)[kSkip]) continue;
      work.job[work.count] = reduction(g_, (const T*)call_.states, call_.weights, edge);
      work.to[work.count] = kept_ + g_.reduced(slot);
      statistics[work.count++] = shape().reduce_statistics(slot);
    }
    run_pointwise<V>(work, statistics);
  }

  void make_node(int target) {
    Combine<T> work;
    work.g = g_;
    work.target = target;
    work.states = call_.states;
    work.output = call_.output;
    work.operations = call_.operations;
    work.bypass = call_.bypass;
    work.mean = call_.mean;
    work.scale = call_.reciprocal_deviation;
    const int64_t channels = g_.channels();
    for (int s = 0; s < target; ++s) {
      const int edge = edge_of(s, target), place = edge * kOperations;
      for (int average = 0; average < 2; ++average) {
        if (!live(edge)[kMaxPool + average]) continue;
        work.add({pools_[s] + average * g_.plane(), channels}, place + kMaxPool + average,
                 shape().pool_statistics(s, average));
      }
      if (live(edge)[kSkip] && g_.stride(s) == 1) {
        work.add(g_.state<const T>(call_.states, call_.output, s), place + kSkip, -1);
      } else if (live(edge)[kSkip]) {
        const int slot = reducing_slot(s, target);
        work.add({kept_ + g_.reduced(slot), channels}, place + kSkip,
                 shape().reduce_statistics(slot));
      }
      for (int operation = kSep3; operation <= kDil5; ++operation) {
        if (!live(edge)[operation]) continue;
        const int c = last_convolution(operation);
        work.add(inputs().plane(edge, c), place + operation,
                 shape().convolution_statistics(edge, c));
      }
    }
    Arena arena(nullptr);
    arena.template take<P>(work.terms * channels);
    arena.template take<P>(channels);
    with_groups<V>(g_, [&](auto groups) {
      launch(combine<T, V, groups()>,
             {blocks_for(g_.node_pixels() * shape().channels / (V * groups())), 1, 1}, arena.used(),
             stream_, work);
    });
  }

  const CellForward<T, P>& call_;
  Geometry g_;
  Stream stream_;
  Arena arena_;
  T *kept_, *unkept_;
  T* pools_[kSources];
  P* moments_;
};

}  // namespace nas::cuda
