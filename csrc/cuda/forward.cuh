// The forward pass of a cell: its launches.
//
// A normalisation needs the whole batch before its first number, so convolutions end a launch. Few
// launches do the work of many edges: all edges that leave the two inputs are ready at once, eight
// of the fourteen, and then all that leave the node before. So there are four rounds of first
// convolutions, with pools; second convolutions of the edges into one node; and that node.

#pragma once

#include "combine.cuh"
#include "convolve.cuh"
#include "pointwise.cuh"
#include "pool.cuh"

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

constexpr int kStream = 1024;  // blocks of a launch that only passes over memory
inline unsigned blocks_for(int64_t items) {
  return unsigned(smaller<int64_t>(divide_up(items, kThreads), kStream));
}
// Numbers of the largest input of a tile among the convolutions of a launch.
template <typename T>
int64_t largest_input(const Inputs<T>& in, const Jobs& jobs, const Tiling& t) {
  int64_t numbers = 0;
  for (int i = 0; i < jobs.count; ++i) {
    const Steps steps = in.steps(jobs.edge[i], jobs.convolution[i]);
    numbers = larger(numbers, steps.region(t).numbers(t.images));
  }
  return numbers;
}
// How the nodes' planes are cut for convolutions; `bytes` is what a tiling needs.
template <typename Bytes>
Tiling plan_nodes(const Geometry& g, Bytes&& bytes) {
  return plan_tiles(g.images(), g.node_height(), g.node_width(), g.channels(), bytes);
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
    }
  }
  return jobs;
}

// One launch of convolutions, which are all first ones or all second ones; returns the blocks of
// each, which leave `moments` where it is not null.
template <int V, typename T>
int run_convolve(const Inputs<T>& in, const Jobs& jobs, T* to, Sum<T>* moments, Stream stream) {
  Convolve<T> work{in, jobs, {}, 0, to, moments};
  const auto bytes = [&](const Tiling& t) {
    Arena arena(nullptr);
    ConvolveMemory<Sum<T>>::take(arena, t, largest_input(in, jobs, t), in.g.channels(), V);
    return arena.used();
  };
  work.tiling = plan_nodes(in.g, bytes);
  work.input = largest_input(in, jobs, work.tiling);
  const int chunks = chunks_for(work.tiling.tiles(), jobs.count);
  launch(convolve<T, V>, {unsigned(chunks), unsigned(jobs.count), 1}, bytes(work.tiling), stream,
         work);
  return chunks;
}

template <typename T, int V>
class Forward {
 public:
  using P = Sum<T>;

  Forward(const CellForward<T, P>& call, void* workspace, Stream stream)
      : call_(call), g_{call.shape}, stream_(stream), arena_(workspace) {
    kept_ = call.kept ? call.kept : arena_.template take<T>(g_.kept());
    seconds_ = arena_.template take<T>(g_.seconds());
    for (auto& pooled : pools_) pooled = arena_.template take<T>(2 * g_.plane());
    const int64_t most = larger(shape().channels, int64_t(1)) * 3;
    // no launch has more jobs than kEdges * kConvolutions, or more blocks than that and kBlocks
    moments_ = arena_.template take<P>((kBlocks + kEdges * kConvolutions) * most);
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
      first_convolutions(first, target);
      pools(first, target);
      reductions(target);
      convolve_all(second_convolutions(call_.live, target), seconds_);
      make_node(target);
    }
  }

 private:
  const CellShape& shape() const { return call_.shape; }
  const bool* live(int edge) const { return call_.live[edge]; }
  P* moments() const { return call_.training ? moments_ : nullptr; }
  Inputs<T> inputs() const {
    return {g_,      call_.states, call_.output, kept_,
            seconds_, call_.mean,   call_.reciprocal_deviation, call_.weights};
  }

  void settle(const Settles& settles) {
    if (!call_.training) return;
    int channels = 0;
    for (int i = 0; i < settles.count; ++i) channels = larger(channels, settles.job[i].channels);
    launch(settle_moments<P>,
           {unsigned(divide_up(channels, kThreads / 32)), unsigned(settles.count), 1}, 0, stream_,
           settles, (const P*)moments_, call_.mean, call_.reciprocal_deviation, call_.variance);
  }

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
    while ((bytes = work.take(Arena(nullptr), V, &in, &out, &staged, &sums)) > kSharedBytes) {
      if (work.rows == 1) throw std::invalid_argument("a cell has too many channels for a GPU");
      work.rows /= 2;
    }
    const int chunks = chunks_for(divide_up(work.pixels, work.rows), work.count);
    launch(pointwise<T, V>, {unsigned(chunks), unsigned(work.count), 1}, bytes, stream_, work);
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
    run_pointwise(work, statistics);
    launch(normalise_states<T, V>, {blocks_for(g_.input_pixels() * shape().channels / V), 2, 1}, 0,
           stream_, g_, call_.states, (const P*)call_.mean, (const P*)call_.reciprocal_deviation);
  }

  void convolve_all(const Jobs& jobs, T* to) {
    if (!jobs.count) return;
    const int chunks = run_convolve<V>(inputs(), jobs, to, moments(), stream_);
    Settles settles;
    for (int i = 0; i < jobs.count; ++i) {
      settles.add({moments_numbers(i * chunks, g_.channels()),
                   shape().convolution_statistics(jobs.edge[i], jobs.convolution[i]),
                   g_.channels(), chunks});
    }
    settle(settles);
  }

  // Calls f(edge) for all edges that leave the states first..target - 1.
  template <typename F>
  void for_fresh(int first, int target, F&& f) const {
    for (int s = first; s < target; ++s) {
      for (int t = larger(2, s + 1); t < kStates; ++t) f(edge_of(s, t));
    }
  }

  void first_convolutions(int first, int target) {
    Jobs jobs;
    for_fresh(first, target, [&](int edge) {
      for (const int c : {kSep3A, kSep5A, kDilated3, kDilated5}) {
        if (live(edge)[operation_of(c)]) jobs.add(edge, c);
      }
    });
    convolve_all(jobs, kept_);
  }

  void pools(int first, int target) {
    Pools<T> work{g_, call_.states, call_.output, 0, {}, {}, {}, moments()};
    for (int s = first; s < target; ++s) {
      if (!pools_alive(call_.live, s)) continue;
      work.source[work.sources] = s;
      work.largest[work.sources] = nullptr;
      work.to[work.sources++] = pools_[s];
    }
    if (!work.sources) return;
    Arena arena(nullptr);
    for (int part = 0; part < 2; ++part) Moments<P>::take(arena, g_.channels(), V);
    const int chunks = chunks_for(divide_up(g_.plane(), kNumbers), 2 * work.sources);
    launch(pool<T, V>, {unsigned(chunks), unsigned(work.sources), 1}, arena.used(), stream_, work);
    Settles settles;
    for (int i = 0; i < work.sources; ++i) {
      for (int average = 0; average < 2; ++average) {
        if (!pool_alive(call_.live, work.source[i], average)) continue;
        settles.add({moments_numbers((i * 2 + average) * chunks, g_.channels()),
                     shape().pool_statistics(work.source[i], average), g_.channels(), chunks});
      }
    }
    settle(settles);
  }

  // All of the skip connections that reduce, in the first round.
  void reductions(int target) {
    if (target != 2 || !shape().reduction) return;
    PointwiseForward<T> work;
    work.pixels = g_.node_pixels();
    int64_t statistics[kReducing];
    for_fresh(0, 2, [&](int edge) {
      if (!live(edge)[kSkip]) return;
      const int slot = reducing_slot(source_of(edge), target_of(edge));
      work.job[work.count] = reduction(g_, (const T*)call_.states, call_.weights, edge);
      work.to[work.count] = kept_ + g_.reduced(slot);
      statistics[work.count++] = shape().reduce_statistics(slot);
    });
    run_pointwise(work, statistics);
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
    const int64_t items = channels / V + shape().channels - channels;
    launch(combine<T, V>, {blocks_for(g_.node_pixels() * items), 1, 1}, arena.used(), stream_,
           work);
  }

  const CellForward<T, P>& call_;
  Geometry g_;
  Stream stream_;
  Arena arena_;
  T *kept_, *seconds_;
  T* pools_[kSources];
  P* moments_;
};

}  // namespace nas::cuda
