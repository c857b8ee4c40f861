// A node: the weighted sum of all that its edges give, and of what passes them by.

#pragma once

#include "statistics.cuh"

namespace nas::cuda {

constexpr int kTerms = kSources * (kOperations - 1);

template <typename T>
struct Combine {
  Geometry g;
  int target, terms = 0;
  const T* plane[kTerms];
  int pitch[kTerms], weight[kTerms];  // the weight's place in `operations`
  int64_t statistic[kTerms];          // or -1: not normalised
  const T* states;
  T* output;
  const Sum<T>*operations, *bypass, *mean, *scale;

  void add(Plane<const T> from, int place, int64_t at) {
    plane[terms] = from.at;
    pitch[terms] = int(from.pitch);
    weight[terms] = place;
    statistic[terms++] = at;
  }
};

// The largest of the 2 x 2 pixels of state `s` that node pixel (y, x) sees, or under stride 1 the
// pixel itself; and which of the four it is.
template <typename T>
NAS_DEVICE Sum<T> bypassing(const Geometry& g, Plane<const T> state, int s, int64_t image, int y,
                            int x, int channel, int* which) {
  const int stride = g.stride(s), height = g.state_height(s), width = g.state_width(s);
  const int64_t at = (image * height + y * stride) * width + x * stride;
  Sum<T> high = load(state.pixel(at) + channel);
  *which = 0;
  for (int i = 1; i < stride * stride; ++i) {
    if (y * 2 + i / 2 >= height || x * 2 + i % 2 >= width) continue;
    const Sum<T> value = load(state.pixel(at + i / 2 * width + i % 2) + channel);
    if (exceeds(value, high)) {
      high = value;
      *which = i;
    }
  }
  return high;
}

// PC-DARTS, section 3.2: where a channel is after the shuffle.
NAS_DEVICE int shuffled(const Geometry& g, int channel) {
  const int mixed = g.channels();
  return channel % mixed * int(g.shape.partial) + channel / mixed;
}

// Where it was before.
NAS_DEVICE int unshuffled(const Geometry& g, int channel) {
  const int partial = int(g.shape.partial);
  return channel % partial * g.channels() + channel / partial;
}

template <typename T, int V>
NAS_KERNEL_OF(T) combine(const __grid_constant__ Combine<T> call) {
  using A = Sum<T>;
  const Geometry& g = call.g;
  const int mixed = g.channels(), channels = int(g.shape.channels);
  Arena arena(shared_memory());
  A* factor = arena.take<A>(int64_t(call.terms) * mixed);
  A* shift = arena.take<A>(mixed);
  for (int c = int(threadIdx.x); c < mixed; c += kThreads) {
    A bias = A(0);
    for (int term = 0; term < call.terms; ++term) {
      A weight = call.operations[call.weight[term]];
      if (call.statistic[term] >= 0) {
        weight *= call.scale[call.statistic[term] + c];
        bias -= weight * call.mean[call.statistic[term] + c];
      }
      factor[term * mixed + c] = weight;
    }
    shift[c] = bias;
  }
  __syncthreads();

  const int across = mixed / V, passing = channels - mixed;
  const int items = across + passing;  // of a pixel: vectors of mixed channels, others one by one
  const int height = g.node_height(), width = g.node_width();
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < g.node_pixels() * items;
       i += int64_t(gridDim.x) * kThreads) {
    const int item = int(i % items);
    const int64_t p = i / items;
    T* node = call.output + (p * kNodes + call.target - 2) * channels;
    if (item >= across) {
      const int channel = mixed + item - across;
      A total = A(0);
      for (int s = 0; s < call.target; ++s) {
        int which;
        total += call.bypass[edge_of(s, call.target)] *
                 bypassing(g, g.state<const T>(call.states, call.output, s), s,
                           p / (int64_t(width) * height), int(p / width % height), int(p % width),
                           channel, &which);
      }
      store(node + shuffled(g, channel), total);
      continue;
    }
    const int channel = item * V;
    A sum[V];
    NAS_UNROLL for (int v = 0; v < V; ++v) sum[v] = shift[channel + v];
    NAS_UNROLL_BY(4) for (int term = 0; term < call.terms; ++term) {
      A values[V];
      load<V>(call.plane[term] + p * call.pitch[term] + channel, values);
      const A* weights = factor + term * mixed + channel;
      NAS_UNROLL for (int v = 0; v < V; ++v) sum[v] += weights[v] * values[v];
    }
    if (passing) {
      NAS_UNROLL for (int v = 0; v < V; ++v) store(node + shuffled(g, channel + v), sum[v]);
    } else {
      store<V>(node + channel, sum);
    }
  }
}

}  // namespace nas::cuda
