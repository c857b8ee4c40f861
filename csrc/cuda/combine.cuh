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

// Of V channels: the largest of the 2 x 2 pixels of state `s` that a node's pixel sees, or under
// stride 1 the pixel itself; and which of the four it is.
template <int V, typename T>
NAS_DEVICE void bypassing(const Geometry& g, Plane<const T> state, int s, const Place& node,
                          int channel, Sum<T> (&high)[V], int (&which)[V]) {
  const int stride = g.stride(s), height = g.state_height(s), width = g.state_width(s);
  const int64_t at = (node.image * height + node.y * stride) * width + node.x * stride;
  load<V>(state.pixel(at) + channel, high);
  NAS_UNROLL for (int v = 0; v < V; ++v) which[v] = 0;
  for (int i = 1; i < stride * stride; ++i) {
    if (node.y * 2 + i / 2 >= height || node.x * 2 + i % 2 >= width) continue;
    Sum<T> values[V];
    load<V>(state.pixel(at + i / 2 * width + i % 2) + channel, values);
    NAS_UNROLL for (int v = 0; v < V; ++v) {
      if (!exceeds(values[v], high[v])) continue;
      high[v] = values[v];
      which[v] = i;
    }
  }
}

// The K groups of a node's channels, each as many as are mixed, are shuffled (PC-DARTS, section
// 3.2): channel j of group k, the mixed ones being group 0, goes to j K + k. V channels each of all
// groups are so V K that lie together, and a thread that has them accesses V at once before and 16
// bytes after. That is compiled for no groups but one, and for four, the paper's; where there are
// others, a thread takes one group, and numbers go one by one after the shuffle. G is how many it
// takes.
constexpr int kPaperGroups = 4;
template <typename T, int V, int G>
constexpr int kShuffled = G > 1 ? kWide<T> : V;  // at once, after the shuffle

// Calls f with G as a constant.
template <int V, typename F>
void with_groups(const Geometry& g, const F& f) {
  if constexpr (V > 1) {
    if (g.shape.partial == kPaperGroups) return f(std::integral_constant<int, kPaperGroups>());
  }
  f(std::integral_constant<int, 1>());
}

// Writes channels channel, channel + 1, ... of the groups group, group + 1, ... of a pixel.
template <int V, int G, typename T>
NAS_DEVICE void store_shuffled(T* pixel, int partial, int group, int channel,
                               const Sum<T> (&x)[G][V]) {
  if (G == 1 && partial > 1) {
    NAS_UNROLL for (int v = 0; v < V; ++v) store(pixel + (channel + v) * partial + group, x[0][v]);
    return;
  }
  constexpr int kEach = kShuffled<T, V, G>;
  NAS_UNROLL for (int first = 0; first < G * V; first += kEach) {
    Sum<T> together[kEach];
    NAS_UNROLL for (int j = 0; j < kEach; ++j) {
      together[j] = x[(first + j) % G][(first + j) / G];
    }
    store<kEach>(pixel + channel * G + first, together);
  }
}

// Adds what passes the edges into a node by, of V channels each of the groups group, group + 1, ...
// but of none that are mixed.
template <int V, int G, typename T>
NAS_DEVICE void add_passing(const Combine<T>& call, const Place& place, int group, int channel,
                            Sum<T> (&to)[G][V]) {
  const Geometry& g = call.g;
  for (int s = 0; s < call.target; ++s) {
    const Plane<const T> state = g.state<const T>(call.states, call.output, s);
    const Sum<T> weight = call.bypass[edge_of(s, call.target)];
    NAS_UNROLL for (int k = 0; k < G; ++k) {
      if (group + k == 0) continue;
      Sum<T> values[V];
      int which[V];
      bypassing(g, state, s, place, (group + k) * g.channels() + channel, values, which);
      NAS_UNROLL for (int v = 0; v < V; ++v) to[k][v] += weight * values[v];
    }
  }
}

template <typename T, int V, int G>
NAS_KERNEL_OF(T) combine(const __grid_constant__ Combine<T> call) {
  using A = Sum<T>;
  const Geometry& g = call.g;
  const int mixed = g.channels(), channels = int(g.shape.channels), partial = int(g.shape.partial);
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

  const int across = mixed / V, items = across * (partial / G);  // of a pixel
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < g.node_pixels() * items;
       i += int64_t(gridDim.x) * kThreads) {
    const int item = int(i % items), channel = item % across * V;
    const int group = G > 1 ? 0 : item / across;
    const int64_t p = i / items;
    A sum[G][V] = {};
    if (group == 0) {
      NAS_UNROLL for (int v = 0; v < V; ++v) sum[0][v] = shift[channel + v];
      NAS_UNROLL_BY(4) for (int term = 0; term < call.terms; ++term) {
        A values[V];
        load<V>(call.plane[term] + p * call.pitch[term] + channel, values);
        const A* weights = factor + term * mixed + channel;
        NAS_UNROLL for (int v = 0; v < V; ++v) sum[0][v] += weights[v] * values[v];
      }
    }
    if (G > 1 || group) {
      add_passing(call, Place::of(p, g.node_height(), g.node_width()), group, channel, sum);
    }
    store_shuffled(call.output + (p * kNodes + call.target - 2) * channels, partial, group, channel,
                   sum);
  }
}

}  // namespace nas::cuda
