// The backward pass of a cell: its launches.
//
// Second convolutions are not kept, nor with few channels dilated ones: those of a node's edges are
// computed again. Nodes go from the last to the first, since a node's gradient is complete when all
// edges that leave it are done; all edges into a node go together. Two sums over the batch stand in
// the way of a node: those that normalisations of its edges' outputs need, and those between
// separable convolutions.

#pragma once

#include "backward_inputs.cuh"

namespace nas::cuda {

template <typename T, int V>
class Backward {
 public:
  using P = Sum<T>;

  Backward(const CellBackward<T, P>& call, void* workspace, Stream stream)
      : call_(call), g_{call.shape}, stream_(stream), memory_(call, workspace) {}

  int64_t workspace_bytes() const { return memory_.bytes; }

  void run() {
    recall_pools();
    if (call_.weights_gradient) {  // of what is not alive
      clear(call_.weights_gradient, shape().weights() * int64_t(sizeof(P)), stream_);
    }
    clear(memory_.states_gradient,
          BackwardMemory<T>::numbers_of_states(g_) * int64_t(sizeof(P)), stream_);
    for (int target = kStates - 1; target >= 2; --target) {
      complete_node(target);
      go_back(target);
    }
    if (call_.bypass_gradient) bypass_gradients();
    if (!call_.before_gradient && !call_.previous_gradient && !call_.weights_gradient) return;
    for (int s = 0; s < 2; ++s) complete_input(s);
    with_whole<T, V>(shape(), [&](auto whole) {
      InputsBack<T, whole()>(call_, memory_, stream_).run();
    });
  }

 private:
  const CellShape& shape() const { return call_.shape; }
  const bool* live(int edge) const { return call_.live[edge]; }
  int64_t channels() const { return g_.channels(); }
  Inputs<T> inputs() const {
    return {g_,
            call_.states,
            call_.output,
            call_.kept,
            memory_.unkept,
            first_edge(target_),
            call_.mean,
            call_.reciprocal_deviation,
            call_.weights};
  }

  // The pools of all states once more, with the place of each maximum.
  void recall_pools() {
    if (shape().reduction) recall_pools(0, 2);
    recall_pools(shape().reduction ? 2 : 0, kSources);
  }
  // Of states of one size.
  void recall_pools(int first, int last) {
    Convolve<T> work{inputs(), {}, {}, {}, 0, 0, nullptr, nullptr, {}, {}, nullptr};
    for (int s = first; s < last; ++s) {
      add_pools(call_.live, s, work.jobs);
      work.jobs.close();
      work.pools[s] = memory_.pools[s];
      work.largest[s] = memory_.largest[s];
    }
    if (work.jobs.count) run_convolve<V>(work, stream_);
  }

  // The convolutions of the node's edges that were not kept, once more.
  void recall(Jobs jobs) {
    if (!g_.keeps(kDilated3)) add_dilated(call_.live, target_, jobs);
    if (!jobs.count) return;
    Convolve<T> work{inputs(), jobs, {}, {}, 0, 0, nullptr, memory_.unkept, {}, {}, nullptr};
    run_convolve<V>(work, stream_);
  }

  // The gradient of the pools of a state, ready to be collected.
  PoolsBack<T> pools_back(int s) {
    if (s >= kSources || !pools_alive(call_.live, s)) return {nullptr, nullptr};
    uint32_t bits = 0;
    for (int target = larger(2, s + 1); target < kStates; ++target) {
      for (int average = 0; average < 2; ++average) {
        bits |= uint32_t(live(edge_of(s, target))[kMaxPool + average]) << (2 * target + average);
      }
    }
    launch(settle_pools<P>, {unsigned(divide_up(channels(), kThreads)), 2, 1}, 0, stream_, g_, s,
           bits, call_.training, (const double*)memory_.pooled, call_.mean,
           call_.reciprocal_deviation, memory_.pool_coefficients);
    const PoolGradient<T> work{g_,
                               s,
                               bits,
                               memory_.pools[s],
                               memory_.nodes,
                               call_.operations,
                               memory_.pool_coefficients,
                               memory_.pool_gradient};
    launch(pool_gradient<T, V>, {blocks_for(g_.plane() / V), 2, 1}, 0, stream_, work);
    return {memory_.pool_gradient, memory_.largest[s]};
  }

  Collect<T> collect(int s) {
    Collect<T> work{g_, s, call_.states, call_.output, call_.output_gradient, nullptr, {}, nullptr,
                    nullptr, nullptr, nullptr};
    work.mixed = s < kSources ? memory_.states_gradient + memory_.state_at[s] : nullptr;
    work.pools = pools_back(s);
    work.bypass = call_.bypass;
    work.rest = memory_.rest;
    return work;
  }

  void complete_node(int target) {
    Collect<T> work = collect(target);
    work.to = node(target);
    work.to_rest = memory_.rest + (target - 2) * g_.node_pixels() * (shape().channels - channels());
    with_groups<V>(g_, [&](auto groups) {
      launch(collect_node<T, V, groups()>,
             {blocks_for(g_.node_pixels() * shape().channels / kTogether<T, V, groups()>), 1, 1}, 0,
             stream_, work);
    });
  }
  void complete_input(int s) {
    Collect<T> work = collect(s);
    work.to = memory_.inputs + s * g_.input_pixels() * shape().channels;
    launch(collect_input<T, V>, {blocks_for(g_.input_pixels() * shape().channels / V), 1, 1}, 0,
           stream_, work);
  }
  P* node(int target) const { return memory_.nodes + (target - 2) * g_.plane(); }

  // Sends the gradient of a node back through all of its edges.
  void go_back(int target) {
    added_ = {};
    target_ = target;
    const Jobs second = second_convolutions(call_.live, target);
    recall(second);
    dot_products(target);
    Jobs first;
    for (int s = 0; s < target; ++s) {
      add_first(call_.live, edge_of(s, target), first);
      first.close();
    }
    pointwise_gradients(second, target, 1);
    depthwise_gradients(second, true);
    pointwise_gradients(first, target, 0);
    depthwise_gradients(first, false);
    skips(target);
    add_up(added_, stream_);
  }

  void dot_products(int target) {
    Dots<T> work{};
    work.g = g_;
    work.target = target;
    work.node = node(target);
    work.mean = call_.mean;
    work.to = memory_.sums;
    SettleDots<P> settle{};
    const auto add = [&](int s, int operation, const T* plane, int64_t pitch, int64_t at) {
      work.plane[s][operation] = plane;
      work.pitch[s][operation] = int(pitch);
      work.statistic[s][operation] = at;
      settle.live[s][operation] = true;
    };
    for (int s = 0; s < target; ++s) {
      const int edge = edge_of(s, target);
      for (int average = 0; average < 2; ++average) {
        if (!live(edge)[kMaxPool + average]) continue;
        add(s, kMaxPool + average, memory_.pools[s] + average * g_.plane(), channels(),
            shape().pool_statistics(s, average));
      }
      if (live(edge)[kSkip] && g_.stride(s) == 1) {
        const Plane<const T> state = g_.state(call_.states, call_.output, s);
        add(s, kSkip, state.at, state.pitch, -1);
      } else if (live(edge)[kSkip]) {
        const int slot = reducing_slot(s, target);
        add(s, kSkip, call_.kept + g_.reduced(slot), channels(), shape().reduce_statistics(slot));
      }
      for (int operation = kSep3; operation <= kDil5; ++operation) {
        if (!live(edge)[operation]) continue;
        const int c = last_convolution(operation);
        add(s, operation, inputs().plane(edge, c).at, channels(),
            shape().convolution_statistics(edge, c));
      }
    }
    const int chunks = chunks_for(divide_up(g_.plane(), kNumbers), target);
    P *sums, *means;
    launch(dots<T, V>, {unsigned(chunks), unsigned(target), 1},
           take_dots<P, V>(Arena(nullptr), int(channels()), &sums, &means), stream_, work);
    settle.g = g_;
    settle.target = target;
    settle.chunks = chunks;
    settle.training = call_.training;
    settle.sums = memory_.sums;
    settle.operations = call_.operations;
    settle.mean = call_.mean;
    settle.scale = call_.reciprocal_deviation;
    settle.coefficients = memory_.coefficients;
    settle.reduced = memory_.reduced;
    settle.pooled = memory_.pooled;
    settle.operations_gradient = call_.operations_gradient;
    launch(settle_dots<P>, {kOperations, unsigned(target), 1},
           kThreads / 32 * int64_t(sizeof(double)), stream_, settle);
  }

  // `round`: 1 for the second convolutions, 0 for the first ones.
  void pointwise_gradients(const Jobs& jobs, int target, int round) {
    if (!jobs.count) return;
    ConvolutionGradient<T> work;
    work.in = inputs();
    work.jobs = jobs;
    work.coefficients = memory_.coefficients;
    work.node = node(target);
    work.between = memory_.between;
    work.depthwise = memory_.depthwise;
    work.matrices = call_.weights_gradient ? memory_.matrices[round] : nullptr;
    const int chunks = run_pointwise_gradient<V>(work, stream_);
    if (!work.matrices) return;
    const int64_t size = channels() * channels();
    for (int i = 0; i < jobs.count; ++i) {
      added_.add(work.matrices + i * chunks * size,
                 call_.weights_gradient + matrix_at(g_, jobs.edge[i], jobs.convolution[i]), chunks,
                 size);
    }
  }

  void depthwise_gradients(const Jobs& jobs, bool second) {
    if (!jobs.count) return;
    DepthwiseGradient<T> work;
    work.in = inputs();
    work.jobs = jobs;
    work.depthwise = memory_.depthwise;
    work.second = second;
    work.to = second ? memory_.between : memory_.states_gradient;
    for (int s = 0; s < kSources; ++s) work.at[s] = memory_.state_at[s];
    work.pairs = memory_.sums;
    work.taps = call_.weights_gradient ? memory_.taps[second] : nullptr;
    taps_used_ = 0;
    if (second || !shape().reduction) {
      run_depthwise(work, 0, kSources);
    } else {  // edges from the inputs have inputs of their own size
      run_depthwise(work, 0, 2);
      run_depthwise(work, 2, kSources);
    }
  }

  // The jobs of edges from the sources first..last - 1.
  void run_depthwise(DepthwiseGradient<T> work, int first, int last) {
    const Jobs& jobs = work.jobs;
    work.halo = 0;
    work.count = 0;
    for (int i = 0, edge = -1; i < jobs.count; ++i) {
      const int s = source_of(jobs.edge[i]);
      if (s < first || s >= last) continue;
      if (work.second || jobs.edge[i] != edge) work.first[work.count++] = uint8_t(i);
      work.last[work.count - 1] = uint8_t(i + 1);
      edge = jobs.edge[i];
      work.halo = larger(work.halo, gradient_halo(work.in.steps(edge, jobs.convolution[i])));
    }
    if (!work.count) return;
    const int source = work.second ? kSources - 1 : first;  // any of its size
    work.stride = work.second ? 1 : g_.stride(source);
    const auto bytes = [&](const Tiling& t) {
      Arena arena(nullptr);
      DepthwiseGradientMemory<P>::take(arena, t, work.stride, work.halo);
      return arena.used();
    };
    work.tiling = plan_tiles(g_.images(), g_.state_height(source), g_.state_width(source),
                             g_.channels(), false, bytes);
    const int chunks = chunks_for(work.tiling.tiles(), work.count);
    if (work.taps) {
      for (int k = 0; k < work.count; ++k) {
        for (int i = work.first[k]; i < work.last[k]; ++i) {
          const Taps taps = Taps::of(jobs.convolution[i]);
          const int64_t size = taps.count() * channels();
          work.taps_at[i] = taps_used_;
          added_.add(work.taps + taps_used_,
                     call_.weights_gradient + taps.at(g_, jobs.edge[i]), chunks, size);
          taps_used_ += chunks * size;
        }
      }
    }
    const dim3 grid{unsigned(chunks), unsigned(work.count), 1};
    if (work.taps) {
      launch(depthwise_gradient<T, V, true>, grid, bytes(work.tiling), stream_, work);
    } else {
      launch(depthwise_gradient<T, V, false>, grid, bytes(work.tiling), stream_, work);
    }
    if (work.second) settle_between(jobs, chunks);
  }

  // Coefficients of the first convolutions of the separable ones.
  void settle_between(const Jobs& jobs, int chunks) {
    SettlePairs<P> settle =
        settle_for(call_, chunks, g_.channels(), double(g_.node_pixels()), false);
    for (int i = 0; i < jobs.count; ++i) {
      const int edge = jobs.edge[i], c = jobs.convolution[i] - 1;
      settle.job[settle.count++] = {
          memory_.sums + int64_t(i) * chunks * 2 * channels(),
          shape().convolution_statistics(edge, c),
          memory_.coefficients + (edge * kConvolutions + c) * 3 * channels()};
    }
    run_settle(settle, stream_);
  }

  // Skip connections: a multiple of the node's gradient, or through a reduction.
  void skips(int target) {
    PointwiseBack<T> work;
    work.pixels = g_.node_pixels();
    work.matrices = call_.weights_gradient ? memory_.reductions : nullptr;
    SkipGradients<T> plain{g_, 0, {}, {}, node(target), call_.operations, memory_.states_gradient};
    for (int s = 0; s < target; ++s) {
      const int edge = edge_of(s, target);
      if (!live(edge)[kSkip]) continue;
      if (g_.stride(s) == 1) {
        plain.edge[plain.count] = edge;
        plain.at[plain.count++] = memory_.state_at[s];
        continue;
      }
      const int slot = reducing_slot(s, target), i = work.count++;
      work.job[i] = reduction(g_, call_.states, call_.weights, edge);
      work.gradient[i] = node(target);
      work.plane[i] = call_.kept + g_.reduced(slot);
      work.coefficients[i] = memory_.reduced + slot * 3 * channels();
      work.write[i] = nullptr;
      work.add[i] = memory_.states_gradient + memory_.state_at[s];
      reduction_to_[i] = reduce_at(g_, slot);
    }
    if (plain.count) {
      launch(skip_gradients<T, V>, {blocks_for(g_.plane() / V), unsigned(plain.count), 1}, 0,
             stream_, plain);
    }
    run_pointwise_back<V>(work, call_.weights_gradient, reduction_to_, added_, stream_);
  }

  void bypass_gradients() {
    if (shape().partial == 1) {
      return clear(call_.bypass_gradient, kEdges * int64_t(sizeof(P)), stream_);
    }
    const BypassDots<T> work{g_, call_.states, call_.output, memory_.rest, memory_.sums};
    const int64_t numbers = g_.node_pixels() * (shape().channels - channels());
    const int chunks = chunks_for(divide_up(numbers, kNumbers), kEdges);
    launch(bypass_dots<T, V>, {unsigned(chunks), kEdges, 1}, kThreads * int64_t(sizeof(P)), stream_,
           work);
    launch(settle_bypass<P>, {1, kEdges, 1}, 0, stream_, chunks, (const P*)memory_.sums,
           call_.bypass_gradient);
  }

  const CellBackward<T, P>& call_;
  Geometry g_;
  Stream stream_;
  BackwardMemory<T> memory_;
  int64_t reduction_to_[kPointwiseJobs];
  int64_t taps_used_ = 0;
  int target_ = kStates - 1;  // the node at hand
  AddChunks<P> added_;
};

}  // namespace nas::cuda
