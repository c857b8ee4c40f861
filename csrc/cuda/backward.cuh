// The backward pass of a cell: its launches.
//
// Second convolutions are not kept: those of a node's edges are computed again.
// Nodes go from the last to the first, since a node's gradient is complete when all edges that leave
// it are done; all edges into a node go together. Two sums over the batch stand in the way of a node:
// those that normalisations of its edges' outputs need, and those between separable convolutions.

#pragma once

#include "collect.cuh"
#include "forward.cuh"

namespace nas::cuda {

template <typename T, int V>
class Backward {
 public:
  using P = Sum<T>;

  Backward(const CellBackward<T, P>& call, void* workspace, Stream stream)
      : call_(call), g_{call.shape}, stream_(stream), arena_(workspace) {
    const int64_t plane = g_.plane(), mixed = g_.channels(), channels = call.shape.channels;
    for (int s = 0; s < kSources; ++s) {
      state_at_[s] = s < 2 ? s * g_.input_pixels() * mixed
                           : 2 * g_.input_pixels() * mixed + (s - 2) * plane;
    }
    states_gradient_ = take<P>(2 * g_.input_pixels() * mixed + (kSources - 2) * plane);
    nodes_ = take<P>(kNodes * plane);
    rest_ = take<P>(kNodes * g_.node_pixels() * (channels - mixed));
    inputs_ = take<P>(2 * g_.input_pixels() * channels);
    for (int s = 0; s < kSources; ++s) {
      pools_[s] = take<T>(2 * plane);
      largest_[s] = take<uint8_t>(plane);
    }
    pool_gradient_ = take<P>(2 * plane);
    between_ = take<P>(2 * kSources * plane);
    seconds_ = take<T>(g_.seconds());
    depthwise_ = take<P>(4 * kSources * plane);
    coefficients_ = take<P>(kEdges * kConvolutions * 3 * mixed);
    reduced_ = take<P>(kReducing * 3 * mixed);
    input_coefficients_ = take<P>(2 * 3 * channels);
    pool_coefficients_ = take<P>(2 * 3 * mixed);
    pooled_ = take<double>(kEdges * 2 * 2 * mixed);
    sums_ = take<P>(most_blocks(kEdges) * kOperations * larger(channels, mixed));
    if (!call.weights_gradient) return;
    matrices_[0] = take<P>(most_blocks(4 * kSources) * mixed * mixed);
    matrices_[1] = take<P>(most_blocks(2 * kSources) * mixed * mixed);
    taps_[0] = take<P>(2 * most_blocks(kSources) * 2 * (9 + 25) * mixed);
    taps_[1] = take<P>(most_blocks(2 * kSources) * 25 * mixed);
    if (call.shape.reduction) reductions_ = take<P>(most_blocks(2) * mixed * mixed);
    preprocess_[0] = take<P>(most_blocks(1) * call.shape.before_channels * channels);
    preprocess_[1] = take<P>(most_blocks(1) * call.shape.previous_channels * channels);
  }

  int64_t workspace_bytes() const { return arena_.used(); }

  void run() {
    recall_pools();
    if (call_.weights_gradient) {  // of what is not alive
      clear(call_.weights_gradient, shape().weights() * int64_t(sizeof(P)), stream_);
    }
    clear(states_gradient_, (state_at_[kSources - 1] + g_.plane()) * int64_t(sizeof(P)), stream_);
    for (int target = kStates - 1; target >= 2; --target) {
      complete_node(target);
      go_back(target);
    }
    if (call_.bypass_gradient) bypass_gradients();
    if (!call_.before_gradient && !call_.previous_gradient && !call_.weights_gradient) return;
    for (int s = 0; s < 2; ++s) complete_input(s);
    preprocess();
  }

 private:
  template <typename N>
  N* take(int64_t count) {
    return arena_.template take<N>(count);
  }
  const CellShape& shape() const { return call_.shape; }
  const bool* live(int edge) const { return call_.live[edge]; }
  int64_t channels() const { return g_.channels(); }
  // Blocks of a launch with up to `jobs` jobs: chunks_for(units, jobs) * jobs is never more.
  int64_t most_blocks(int jobs) const {
    return smaller<int64_t>(kBlocks + jobs, jobs * larger(g_.node_pixels(), g_.input_pixels()));
  }
  Inputs<T> inputs() const {
    return {g_,       call_.states, call_.output, call_.kept,
            seconds_, call_.mean,   call_.reciprocal_deviation, call_.weights};
  }

  // The pools of all states once more, with the place of each maximum.
  void recall_pools() {
    Pools<T> work{g_, call_.states, call_.output, 0, {}, {}, {}, nullptr};
    for (int s = 0; s < kSources; ++s) {
      if (!pools_alive(call_.live, s)) continue;
      work.source[work.sources] = s;
      work.to[work.sources] = pools_[s];
      work.largest[work.sources++] = largest_[s];
    }
    if (!work.sources) return;
    Arena arena(nullptr);
    for (int part = 0; part < 2; ++part) Moments<P>::take(arena, g_.channels(), V);
    const int chunks = chunks_for(divide_up(g_.plane(), kNumbers), work.sources);
    launch(pool<T, V>, {unsigned(chunks), unsigned(work.sources), 1}, arena.used(), stream_, work);
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
           bits, call_.training, (const double*)pooled_, call_.mean, call_.reciprocal_deviation,
           pool_coefficients_);
    const PoolGradient<T> work{g_,     s,     bits, pools_[s], nodes_, call_.operations,
                               pool_coefficients_, pool_gradient_};
    launch(pool_gradient<T, V>, {blocks_for(g_.plane() / V), 2, 1}, 0, stream_, work);
    return {pool_gradient_, largest_[s]};
  }

  Collect<T> collect(int s) {
    Collect<T> work{g_, s, call_.states, call_.output, call_.output_gradient, nullptr, {}, nullptr,
                    nullptr, nullptr, nullptr};
    work.mixed = s < kSources ? states_gradient_ + state_at_[s] : nullptr;
    work.pools = pools_back(s);
    work.bypass = call_.bypass;
    work.rest = rest_;
    return work;
  }
  int64_t items() const { return channels() / V + shape().channels - channels(); }

  void complete_node(int target) {
    Collect<T> work = collect(target);
    work.to = node(target);
    work.to_rest = rest_ + (target - 2) * g_.node_pixels() * (shape().channels - channels());
    launch(collect_node<T, V>, {blocks_for(g_.node_pixels() * items()), 1, 1}, 0, stream_, work);
  }
  void complete_input(int s) {
    Collect<T> work = collect(s);
    work.to = inputs_ + s * g_.input_pixels() * shape().channels;
    launch(collect_input<T, V>, {blocks_for(g_.input_pixels() * items()), 1, 1}, 0, stream_, work);
  }
  P* node(int target) const { return nodes_ + (target - 2) * g_.plane(); }

  // Sends the gradient of a node back through all of its edges.
  void go_back(int target) {
    added_ = {};
    const Jobs second = second_convolutions(call_.live, target);
    if (second.count) run_convolve<V>(inputs(), second, seconds_, (P*)nullptr, stream_);
    dot_products(target);
    Jobs first;
    for (int s = 0; s < target; ++s) {
      const int edge = edge_of(s, target);
      for (const int c : {kSep3A, kSep5A, kDilated3, kDilated5}) {
        if (live(edge)[operation_of(c)]) first.add(edge, c);
      }
    }
    pointwise_gradients(second, target, 1);
    depthwise_gradients(second, true);
    pointwise_gradients(first, target, 0);
    depthwise_gradients(first, false);
    skips(target);
    add_up();
  }

  void dot_products(int target) {
    Dots<T> work{};
    work.g = g_;
    work.target = target;
    work.node = node(target);
    work.mean = call_.mean;
    work.to = sums_;
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
        add(s, kMaxPool + average, pools_[s] + average * g_.plane(), channels(),
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
    constexpr int kTogether = V < 4 ? V : 4;  // a thread has no registers for the sums of eight
    launch(dots<T, kTogether>, {unsigned(chunks), unsigned(target), 1},
           kThreads * kTogether * int64_t(sizeof(P)), stream_, work);
    settle.g = g_;
    settle.target = target;
    settle.chunks = chunks;
    settle.training = call_.training;
    settle.sums = sums_;
    settle.operations = call_.operations;
    settle.mean = call_.mean;
    settle.scale = call_.reciprocal_deviation;
    settle.coefficients = coefficients_;
    settle.reduced = reduced_;
    settle.pooled = pooled_;
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
    work.coefficients = coefficients_;
    work.node = node(target);
    work.between = between_;
    work.depthwise = depthwise_;
    work.matrices = call_.weights_gradient ? matrices_[round] : nullptr;
    const auto bytes = [&](const Tiling& t) {
      Arena arena(nullptr);
      GradientMemory<P>::take(arena, t, largest_input(work.in, jobs, t), g_.channels(),
                              work.matrices);
      return arena.used();
    };
    work.tiling = plan_nodes(g_, bytes);
    work.input = largest_input(work.in, jobs, work.tiling);
    const int chunks = chunks_for(work.tiling.tiles(), jobs.count);
    launch(pointwise_gradient<T, V>, {unsigned(chunks), unsigned(jobs.count), 1},
           bytes(work.tiling), stream_, work);
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
    work.depthwise = depthwise_;
    work.second = second;
    work.to = second ? between_ : states_gradient_;
    for (int s = 0; s < kSources; ++s) work.at[s] = state_at_[s];
    work.pairs = sums_;
    work.taps = call_.weights_gradient ? taps_[second] : nullptr;
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
    int halo = 0;
    work.count = 0;
    for (int i = 0, edge = -1; i < jobs.count; ++i) {
      const int s = source_of(jobs.edge[i]);
      if (s < first || s >= last) continue;
      if (work.second || jobs.edge[i] != edge) work.first[work.count++] = uint8_t(i);
      work.last[work.count - 1] = uint8_t(i + 1);
      edge = jobs.edge[i];
      halo = larger(halo, gradient_halo(work.in.steps(edge, jobs.convolution[i])));
    }
    if (!work.count) return;
    const int source = work.second ? kSources - 1 : first;  // any of its size
    const int stride = work.second ? 1 : g_.stride(source);
    const auto bytes = [&](const Tiling& t) {
      Arena arena(nullptr);
      DepthwiseGradientMemory<P>::take(arena, t, stride, halo);
      return arena.used();
    };
    work.tiling = plan_tiles(g_.images(), g_.state_height(source), g_.state_width(source),
                             g_.channels(), bytes);
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
    SettlePairs<P> settle = pairs(chunks, g_.channels(), double(g_.node_pixels()), false);
    for (int i = 0; i < jobs.count; ++i) {
      const int edge = jobs.edge[i], c = jobs.convolution[i] - 1;
      settle.job[settle.count++] = {
          sums_ + int64_t(i) * chunks * 2 * channels(), shape().convolution_statistics(edge, c),
          coefficients_ + (edge * kConvolutions + c) * 3 * channels()};
    }
    run_settle(settle);
  }
  SettlePairs<P> pairs(int chunks, int channels, double numbers, bool normalised) const {
    SettlePairs<P> settle{};
    settle.chunks = chunks;
    settle.channels = channels;
    settle.numbers = numbers;
    settle.training = call_.training;
    settle.normalised = normalised;
    settle.mean = call_.mean;
    settle.scale = call_.reciprocal_deviation;
    return settle;
  }
  void run_settle(const SettlePairs<P>& settle) {
    launch(settle_pairs<P>,
           {unsigned(divide_up(settle.channels, kThreads / 32)), unsigned(settle.count), 1}, 0,
           stream_, settle);
  }

  // Skip connections: a multiple of the node's gradient, or through a reduction.
  void skips(int target) {
    PointwiseBack<T> work;
    work.pixels = g_.node_pixels();
    work.matrices = call_.weights_gradient ? reductions_ : nullptr;
    SkipGradients<T> plain{g_, 0, {}, {}, node(target), call_.operations, states_gradient_};
    for (int s = 0; s < target; ++s) {
      const int edge = edge_of(s, target);
      if (!live(edge)[kSkip]) continue;
      if (g_.stride(s) == 1) {
        plain.edge[plain.count] = edge;
        plain.at[plain.count++] = state_at_[s];
        continue;
      }
      const int slot = reducing_slot(s, target), i = work.count++;
      work.job[i] = reduction(g_, call_.states, call_.weights, edge);
      work.gradient[i] = node(target);
      work.plane[i] = call_.kept + g_.reduced(slot);
      work.coefficients[i] = reduced_ + slot * 3 * channels();
      work.write[i] = nullptr;
      work.add[i] = states_gradient_ + state_at_[s];
      reduction_to_[i] = reduce_at(g_, slot);
    }
    if (plain.count) {
      launch(skip_gradients<T, V>, {blocks_for(g_.plane() / V), unsigned(plain.count), 1}, 0,
             stream_, plain);
    }
    run_pointwise_back(work, reduction_to_);
  }

  void run_pointwise_back(PointwiseBack<T>& work, const int64_t* to) {
    if (!work.count) return;
    int inputs = 1, outputs = 1;
    for (int i = 0; i < work.count; ++i) {
      inputs = larger(inputs, work.job[i].inputs);
      outputs = larger(outputs, work.job[i].outputs);
    }
    work.rows = pointwise_rows(inputs, outputs);
    P *in, *back, *out, *staged;
    int64_t bytes;
    while ((bytes = work.take(Arena(nullptr), &in, &back, &out, &staged)) > kSharedBytes) {
      if (work.rows == 1) throw std::invalid_argument("a cell has too many channels for a GPU");
      work.rows /= 2;
    }
    const int chunks = chunks_for(divide_up(work.pixels, work.rows), work.count);
    int64_t used = 0;
    for (int i = 0; i < work.count; ++i) {
      const int64_t size = int64_t(work.job[i].inputs) * work.job[i].outputs;
      work.matrices_at[i] = used;
      if (work.matrices) {
        added_.add(work.matrices + used, call_.weights_gradient + to[i], chunks, size);
      }
      used += chunks * size;
    }
    launch(pointwise_back<T, V>, {unsigned(chunks), unsigned(work.count), 1}, bytes, stream_, work);
  }

  // The sums of all blocks, of the weights' gradients since `added_` was emptied.
  void add_up() {
    if (!added_.jobs) return;
    launch(add_chunks<P>, {unsigned(divide_up(added_.most, kThreads)), unsigned(added_.jobs), 1}, 0,
           stream_, added_);
  }

  void bypass_gradients() {
    if (shape().partial == 1) {
      return clear(call_.bypass_gradient, kEdges * int64_t(sizeof(P)), stream_);
    }
    const BypassDots<T> work{g_, call_.states, call_.output, rest_, sums_};
    const int64_t numbers = g_.node_pixels() * (shape().channels - channels());
    const int chunks = chunks_for(divide_up(numbers, kNumbers), kEdges);
    launch(bypass_dots<T>, {unsigned(chunks), kEdges, 1}, kThreads * int64_t(sizeof(P)), stream_,
           work);
    launch(settle_bypass<P>, {1, kEdges, 1}, 0, stream_, chunks, (const P*)sums_,
           call_.bypass_gradient);
  }

  // Through the convolutions that made the states of the inputs.
  void preprocess() {
    const int64_t numbers = g_.input_pixels() * shape().channels;
    const int chunks = chunks_for(divide_up(numbers, kNumbers), 2);
    launch(state_pairs<T>, {unsigned(chunks), 2, 1},
           2 * int64_t(Share::of(int(shape().channels), 1).items()) * int64_t(sizeof(P)), stream_,
           g_, call_.states, (const P*)inputs_, sums_);
    SettlePairs<P> settle =
        pairs(chunks, int(shape().channels), double(g_.input_pixels()), true);
    for (int which = 0; which < 2; ++which) {
      settle.job[settle.count++] = {sums_ + int64_t(which) * chunks * 2 * shape().channels,
                                    shape().preprocess_statistics(which),
                                    input_coefficients_ + which * 3 * shape().channels};
    }
    run_settle(settle);
    added_ = {};
    for (int which = 0; which < 2; ++which) preprocess(which);
    add_up();
  }
  void preprocess(int which) {
    T* gradient = which ? call_.previous_gradient : call_.before_gradient;
    if (!gradient && !call_.weights_gradient) return;
    PointwiseBack<T> work;
    work.pixels = g_.input_pixels();
    work.count = 1;
    work.job[0] = preprocessing(shape(), call_.before, call_.previous, call_.weights, which);
    work.gradient[0] = inputs_ + which * g_.input_pixels() * shape().channels;
    work.plane[0] = call_.states + which * g_.input_pixels() * shape().channels;
    work.coefficients[0] = input_coefficients_ + which * 3 * shape().channels;
    work.write[0] = gradient;
    work.add[0] = nullptr;
    work.matrices = call_.weights_gradient ? preprocess_[which] : nullptr;
    if (gradient && work.job[0].halves == 2) {  // pixels that neither half sees
      clear(gradient,
            shape().images * shape().before_height * shape().before_width *
                shape().before_channels * int64_t(sizeof(T)),
            stream_);
    }
    const int64_t to = shape().preprocess(which);
    run_pointwise_back(work, &to);
  }

  const CellBackward<T, P>& call_;
  Geometry g_;
  Stream stream_;
  Arena arena_;
  int64_t state_at_[kSources];         // of a state's mixed channels in states_gradient_
  P* states_gradient_;                 // from convolutions and skips; accumulated in float
  P* nodes_;                           // gradients of the nodes' mixed channels
  P* rest_;                            // of the others
  P* inputs_;                          // of the preprocessed inputs, all channels
  T* pools_[kSources];
  uint8_t* largest_[kSources];
  P* pool_gradient_;
  P* between_;                         // see ConvolutionGradient
  T* seconds_;                         // second convolutions of a node, once more
  P* depthwise_;
  P* coefficients_;
  P* reduced_;
  P* input_coefficients_;
  P* pool_coefficients_;
  double* pooled_;
  P* sums_;                            // of blocks, for the launch that follows
  P* matrices_[2] = {};                // weight gradients of blocks, until the end of a node
  P* taps_[2] = {};
  P* reductions_ = nullptr;
  P* preprocess_[2] = {};
  int64_t reduction_to_[kPointwiseJobs];
  int64_t taps_used_ = 0;
  AddChunks<P> added_;
};

}  // namespace nas::cuda
