// The whole gradient of a state, from the edges that leave it.

#pragma once

#include "dots.cuh"
#include "pointwise.cuh"
#include "pool.cuh"

namespace nas::cuda {

// What the pools of a state send back to one of its pixels.
template <typename T>
struct PoolsBack {
  const Sum<T>* gradient;     // maximum, average; or null: no pools
  const uint8_t* largest;     // where in its window each maximum was

  template <int V>
  NAS_DEVICE void add(const Geometry& g, int s, const Place& place, int channel,
                      Sum<T> (&to)[V]) const {
    if (!gradient) return;
    const int y = place.y, x = place.x;
    const int stride = g.stride(s), channels = g.channels();
    const int height = g.state_height(s), width = g.state_width(s);
    const int last_y = smaller((y + 1) / stride, g.node_height() - 1);
    const int last_x = smaller((x + 1) / stride, g.node_width() - 1);
    for (int r = larger(y - 1 + stride - 1, 0) / stride; r <= last_y; ++r) {
      const int rows = Window::of(r, stride, height).count();
      for (int c = larger(x - 1 + stride - 1, 0) / stride; c <= last_x; ++c) {
        const Sum<T> each = Sum<T>(1) / Sum<T>(rows * Window::of(c, stride, width).count());
        const int64_t at =
            ((place.image * g.node_height() + r) * g.node_width() + c) * channels + channel;
        const auto here = uint8_t((y - (r * stride - 1)) * 3 + x - (c * stride - 1));
        Sum<T> high[V], average[V];
        load<V>(gradient + at, high);
        load<V>(gradient + g.plane() + at, average);
        NAS_UNROLL for (int v = 0; v < V; ++v) {
          to[v] += average[v] * each + (largest[at + v] == here ? high[v] : Sum<T>(0));
        }
      }
    }
  }
};

template <typename T>
struct Collect {
  Geometry g;
  int s;
  const T *states, *output, *output_gradient;
  const Sum<T>* mixed;        // of the state's mixed channels, from convolutions and skips
  PoolsBack<T> pools;
  const Sum<T>* bypass;       // weights
  const Sum<T>* rest;         // of the nodes' other channels [node][pixel][C - c]
  Sum<T>* to;                 // a node: its mixed channels; an input: all channels [pixel][C]
  Sum<T>* to_rest;            // a node: the other channels
};

// What the edges that leave the state send back to V channels of those that pass by, of node pixel
// p.
template <int V, typename T>
NAS_DEVICE void add_passed_back(const Collect<T>& call, int64_t p, int channel, Sum<T> (&to)[V]) {
  const Geometry& g = call.g;
  const int mixed = g.channels(), passing = int(g.shape.channels) - mixed;
  for (int target = larger(2, call.s + 1); target < kStates; ++target) {
    const Sum<T> weight = call.bypass[edge_of(call.s, target)];
    Sum<T> values[V];
    load<V>(call.rest + ((target - 2) * g.node_pixels() + p) * passing + channel - mixed, values);
    NAS_UNROLL for (int v = 0; v < V; ++v) to[v] += weight * values[v];
  }
}

// Adds what the edges that leave a node send back to V of its channels, as they are after the
// shuffle. The edges mix all of them or none.
template <int V, typename T>
NAS_DEVICE void add_sent_back(const Collect<T>& call, int64_t p, int channel, Sum<T> (&to)[V]) {
  const Geometry& g = call.g;
  const int mixed = g.channels();
  if (call.s == kSources) return;
  if (channel >= mixed) return add_passed_back(call, p, channel, to);
  Sum<T> more[V];
  load<V>(call.mixed + p * mixed + channel, more);
  NAS_UNROLL for (int v = 0; v < V; ++v) to[v] += more[v];
  call.pools.add(g, call.s, Place::of(p, g.node_height(), g.node_width()), channel, to);
}

// Numbers that a thread takes together, of G groups: as many of each as are written at once.
template <typename T, int V, int G>
constexpr int kTogether = G > 1 ? G * kWide<Sum<T>> : V;

// A node's gradient, before its channels were shuffled. Edges that leave it were added up in
// `mixed`, or there are none: s is kSources.
template <typename T, int V, int G>
NAS_KERNEL_OF(T)
    collect_node(const __grid_constant__ Collect<T> call) {
  using A = Sum<T>;
  constexpr int kRead = kShuffled<T, V, G>;
  constexpr int kEach = kTogether<T, V, G> / G;  // of a group
  const Geometry& g = call.g;
  const int mixed = g.channels(), passing = int(g.shape.channels) - mixed;
  const int partial = int(g.shape.partial), items = int(g.shape.channels) / kTogether<T, V, G>;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < g.node_pixels() * items;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t p = i / items;
    const int first = int(i % items) * kTogether<T, V, G>;
    // Where the gradient of a channel goes that was `before` before the shuffle.
    const auto place = [&](int before) {
      return before < mixed ? call.to + p * mixed + before
                            : call.to_rest + p * passing + before - mixed;
    };
    A sum[kTogether<T, V, G> / V][V];
    NAS_UNROLL for (int n = 0; n < kTogether<T, V, G>; n += kRead) {
      A values[kRead];
      load<kRead>(call.output_gradient + (p * kNodes + call.s - 2) * g.shape.channels + first + n,
                  values);
      NAS_UNROLL for (int j = 0; j < kRead; ++j) sum[(n + j) / V][(n + j) % V] = values[j];
    }
    NAS_UNROLL for (int piece = 0; piece < kTogether<T, V, G> / V; ++piece) {
      add_sent_back(call, p, first + piece * V, sum[piece]);
    }
    if (G == 1 && partial > 1) {
      NAS_UNROLL for (int v = 0; v < V; ++v) {
        const int channel = first + v;
        store(place(channel % partial * mixed + channel / partial), sum[0][v]);
      }
      continue;
    }
    NAS_UNROLL for (int k = 0; k < G; ++k) {
      A together[kEach];
      NAS_UNROLL for (int j = 0; j < kEach; ++j) {
        const int n = j * G + k;
        together[j] = sum[n / V][n % V];
      }
      store<kEach>(place(k * mixed + first / G), together);
    }
  }
}

// That of a preprocessed input.
template <typename T, int V>
NAS_KERNEL_OF(T)
    collect_input(const __grid_constant__ Collect<T> call) {
  using A = Sum<T>;
  const Geometry& g = call.g;
  const int mixed = g.channels(), channels = int(g.shape.channels), items = channels / V;
  const int stride = g.stride(call.s);
  const Plane<const T> state = g.state(call.states, call.output, call.s);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < g.input_pixels() * items;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t p = i / items;
    const int channel = int(i % items) * V;
    const Place here = Place::of(p, g.state_height(call.s), g.state_width(call.s));
    A sum[V] = {};
    if (channel < mixed) {
      load<V>(call.mixed + p * mixed + channel, sum);
      call.pools.add(g, call.s, here, channel, sum);
    } else {
      const Place node{here.image, here.y / stride, here.x / stride};
      add_passed_back(call, (node.image * g.node_height() + node.y) * g.node_width() + node.x,
                      channel, sum);
      if (stride == 2) {  // to the largest alone
        A high[V];
        int which[V];
        bypassing(g, state, call.s, node, channel, high, which);
        NAS_UNROLL for (int v = 0; v < V; ++v) {
          if (which[v] != here.y % 2 * 2 + here.x % 2) sum[v] = A(0);
        }
      }
    }
    store<V>(call.to + p * channels + channel, sum);
  }
}

// Skip connections under stride 1: adds a multiple of the node's gradient to the states'.
template <typename T>
struct SkipGradients {
  Geometry g;
  int count, edge[kSources];
  int64_t at[kSources];
  const Sum<T>*node, *operations;
  Sum<T>* to;
};

template <typename T, int V>
NAS_KERNEL_OF(T)
    skip_gradients(const __grid_constant__ SkipGradients<T> call) {
  using A = Sum<T>;
  const A weight = call.operations[call.edge[blockIdx.y] * kOperations + kSkip];
  A* to = call.to + call.at[blockIdx.y];
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < call.g.plane() / V;
       i += int64_t(gridDim.x) * kThreads) {
    A sum[V], values[V];
    load<V>(to + i * V, sum);
    load<V>(call.node + i * V, values);
    NAS_UNROLL for (int v = 0; v < V; ++v) sum[v] += weight * values[v];
    store<V>(to + i * V, sum);
  }
}

// ---- through 1x1 convolutions of rectified inputs ----

// Sums that the gradient of a preprocessing needs: of G and of G times the normalised state.
template <typename T, int V>
NAS_KERNEL_OF(T)
    state_pairs(Geometry g, const T* states, const Sum<T>* gradients, Sum<T>* to) {
  using A = Sum<T>;
  const int channels = int(g.shape.channels);
  const int64_t offset = blockIdx.y * g.input_pixels() * channels;
  to += (blockIdx.y * int64_t(gridDim.x) + blockIdx.x) * 2 * channels;
  sum_pairs<V>(g.input_pixels(), channels, to,
               [&](int64_t at, int, A(&gradient)[V], A(&values)[V]) {
                 load<V>(gradients + offset + at, gradient);
                 load<V>(states + offset + at, values);
               });
}

template <typename T>
struct PointwiseBack {
  Pointwise<T> job[kPointwiseJobs];
  const Sum<T>* gradient[kPointwiseJobs];     // of what was normalised to [pixel][outputs]
  const T* plane[kPointwiseJobs];             // what the coefficients' d goes with
  const Sum<T>* coefficients[kPointwiseJobs];
  T* write[kPointwiseJobs];                   // the input's gradient is written here,
  Sum<T>* add[kPointwiseJobs];                // or added here [pixel][inputs], or neither
  bool begun = false;                         // what is written to holds a part already
  Sum<T>* matrices;                           // [job][chunk][...], or null
  int64_t matrices_at[kPointwiseJobs];
  int count = 0, rows;
  int64_t pixels;                             // of every output

  // Shared memory: inputs, their gradients, the outputs' gradients, scratch.
  NAS_BOTH int64_t take(Arena arena, Sum<T>** in, Sum<T>** back, Sum<T>** out,
                        Sum<T>** staged) const {
    int inputs = 0, outputs = 0;
    for (int i = 0; i < count; ++i) {
      inputs = larger(inputs, job[i].inputs);
      outputs = larger(outputs, job[i].outputs);
    }
    const int64_t tile = int64_t(rows) * row_pitch(inputs);
    *in = arena.take<Sum<T>>(tile);
    *back = arena.take<Sum<T>>(larger(tile, int64_t(matrices ? kOuter : 0)));
    *out = arena.take<Sum<T>>(int64_t(rows) * row_pitch(outputs + 3));
    *staged = arena.take<Sum<T>>(staged_numbers(inputs));
    return arena.used();
  }
};

// Gradients of what a job gave, of `rows` pixels from `start` on, of which `count` exist: columns
// first, first + 1, ... of the outputs to out [pixel][column].
template <int V, typename T>
NAS_DEVICE void load_gradients(const PointwiseBack<T>& call, int number, int first, int columns,
                               int64_t start, int count, Sum<T>* out, int pitch) {
  using A = Sum<T>;
  const int outputs = call.job[number].outputs, across = columns / V;
  const Coefficients<A> coefficients{call.coefficients[number], outputs};
  for (int i = int(threadIdx.x); i < call.rows * across; i += kThreads) {
    const int row = i / across, column = i % across * V;
    A gradient[V] = {}, values[V];
    if (row < count) {
      const int64_t at = (start + row) * outputs + first + column;
      load<V>(call.gradient[number] + at, gradient);
      load<V>(call.plane[number] + at, values);
      NAS_UNROLL for (int v = 0; v < V; ++v) {
        gradient[v] = coefficients(gradient[v], values[v], first + column + v);
      }
    }
    NAS_UNROLL for (int v = 0; v < V; ++v) out[row * pitch + column + v] = gradient[v];
  }
}

template <typename T, int V>
NAS_KERNEL_OF(T)
    pointwise_back(const __grid_constant__ PointwiseBack<T> call) {
  using A = Sum<T>;
  constexpr int kHalf = V > 1 ? V / 2 : 1;
  const int number = int(blockIdx.y);
  const Pointwise<T>& job = call.job[number];
  A *in, *back, *out, *staged;
  call.take(Arena(shared_memory()), &in, &back, &out, &staged);
  const int in_pitch = row_pitch(job.inputs), out_pitch = job.tile_pitch();
  const Span span = Span::of(divide_up(call.pixels, call.rows), int(gridDim.x), int(blockIdx.x));
  const bool wanted = call.write[number] || call.add[number];
  A* partial = call.matrices + call.matrices_at[number] +
               int64_t(blockIdx.x) * job.inputs * job.outputs;
  clear_padding(in, call.rows, job.inputs, in_pitch);
  for (int i = int(threadIdx.x); i < call.rows * out_pitch; i += kThreads) out[i] = A(0);
  for (int half = 0; half < job.halves; ++half) {
    const int first = job.first(half), columns = job.last(half) - first;
    if (!columns) continue;  // half of one channel is none
    MatrixGradient<T> sums(job.inputs, columns, job.outputs, partial + first);
    for (int64_t index = span.first; index < span.last; ++index) {
      const int64_t start = index * call.rows;
      const int count = int(smaller<int64_t>(call.rows, call.pixels - start));
      __syncthreads();
      const auto fits = [&](int width) { return columns % width == 0 && first % width == 0; };
      if (fits(V)) {
        load_gradients<V>(call, number, first, columns, start, count, out, out_pitch);
      } else if (fits(kHalf)) {  // half of the outputs
        load_gradients<kHalf>(call, number, first, columns, start, count, out, out_pitch);
      } else {
        load_gradients<1>(call, number, first, columns, start, count, out, out_pitch);
      }
      job.template load_rows<V>(half, start, call.rows, count, in, in_pitch);
      __syncthreads();
      if (call.matrices) sums.add(in, in_pitch, out, out_pitch, call.rows);
      if (!wanted) continue;
      product<T>(out, out_pitch, call.rows, columns, job.inputs,
                 [&](int k, int c) { return job.weights[c * job.outputs + first + k]; }, staged,
                 ToShared<A>{back, in_pitch, call.rows, job.inputs});
      const int across = job.inputs / V;
      for (int i = int(threadIdx.x); i < count * across; i += kThreads) {
        const int row = i / across, c = i % across * V;
        const int64_t pixel = job.source(half, start + row);
        if (pixel < 0) continue;
        const int64_t at = pixel * job.inputs + c;
        const A *gradient = back + row * in_pitch + c, *input = in + row * in_pitch + c;
        A values[V] = {};
        if (!call.write[number]) {
          load<V>(call.add[number] + at, values);
        } else if (call.begun) {
          load<V>(call.write[number] + at, values);
        }
        NAS_UNROLL for (int v = 0; v < V; ++v) values[v] += relu_gradient(gradient[v], input[v]);
        if (call.write[number]) {
          store<V>(call.write[number] + at, values);
        } else {
          store<V>(call.add[number] + at, values);
        }
      }
    }
    __syncthreads();
    if (call.matrices) sums.finish(back);
  }
}

}  // namespace nas::cuda
