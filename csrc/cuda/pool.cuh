// 3x3 max and average pooling, padding 1; the average counts real pixels only. Pools have no
// parameters: they are computed once a state, for all edges that leave it.

#pragma once

#include "statistics.cuh"

namespace nas::cuda {

struct Window {  // rows or columns of the input that an output sees
  int first, last;

  NAS_BOTH static Window of(int output, int stride, int size) {
    return {larger(output * stride - 1, 0), smaller(output * stride + 2, size)};
  }
  NAS_BOTH int count() const { return last - first; }
};

// The pools of the states first_source, first_source + 1, ...
template <typename T>
struct Pools {
  Geometry g;
  const T *states, *output;
  int sources, source[kSources];
  T* to[kSources];             // maximum, then average: two planes
  uint8_t* largest[kSources];  // where in its window a maximum is, for the backward pass; or null
  Sum<T>* moments;             // [source][maximum, average], or null
};

template <typename T, int V>
NAS_KERNEL_OF(T) pool(const __grid_constant__ Pools<T> call) {
  using A = Sum<T>;
  const Geometry& g = call.g;
  const int s = call.source[blockIdx.y], channels = g.channels(), stride = g.stride(s);
  const int height = g.state_height(s), width = g.state_width(s);
  const int out_height = g.node_height(), out_width = g.node_width();
  const Plane<const T> state = g.state(call.states, call.output, s);
  T* to = call.to[blockIdx.y];
  uint8_t* largest = call.largest[blockIdx.y];
  Arena arena(shared_memory());
  const Moments<A> sums[2] = {Moments<A>::take(arena, channels, V),
                              Moments<A>::take(arena, channels, V)};
  const Share share = Share::of(channels, V);
  const Span span = Span::of(g.node_pixels(), int(gridDim.x), int(blockIdx.x));

  // One output pixel: maximum, place of the maximum, average.
  const auto window = [&](int64_t p, int channel, A (&high)[V], uint8_t (&place)[V],
                          A (&average)[V]) {
    const int x = int(p % out_width), y = int(p / out_width % out_height);
    const int64_t image = p / (int64_t(out_width) * out_height);
    const Window rows = Window::of(y, stride, height), columns = Window::of(x, stride, width);
    A total[V] = {};
    for (int r = rows.first; r < rows.last; ++r) {
      for (int c = columns.first; c < columns.last; ++c) {
        A values[V];
        load<V>(state.pixel((image * height + r) * width + c) + channel, values);
        const bool begin = r == rows.first && c == columns.first;
        const auto here = uint8_t((r - (y * stride - 1)) * 3 + c - (x * stride - 1));
        NAS_UNROLL for (int v = 0; v < V; ++v) {
          if (begin || exceeds(values[v], high[v])) {
            high[v] = values[v];
            place[v] = here;
          }
          total[v] += values[v];
        }
      }
    }
    const A each = A(1) / A(rows.count() * columns.count());
    NAS_UNROLL for (int v = 0; v < V; ++v) average[v] = total[v] * each;
  };

  for (int part = 0; part < 2; ++part) sums[part].template start<V>(channels);
  for (int item = int(threadIdx.x); item < share.across; item += kThreads) {
    A high[V], average[V];
    uint8_t place[V];
    window(span.first, item * V, high, place, average);
    NAS_UNROLL for (int v = 0; v < V; ++v) {
      sums[0].shift[item * V + v] = high[v];
      sums[1].shift[item * V + v] = average[v];
    }
  }
  __syncthreads();
  for (int item = int(threadIdx.x); item < share.items(); item += kThreads) {
    const int worker = item / share.across, channel = item % share.across * V;
    for (int64_t p = span.first + worker; p < span.last; p += share.workers) {
      A high[V], average[V];
      uint8_t place[V];
      window(p, channel, high, place, average);
      const int64_t at = p * channels + channel;
      store<V>(to + at, high);
      store<V>(to + g.plane() + at, average);
      if (largest) {
        NAS_UNROLL for (int v = 0; v < V; ++v) largest[at + v] = place[v];
      }
      if (!call.moments) continue;
      sums[0].template add<V>(worker, channels, channel, high);
      sums[1].template add<V>(worker, channels, channel, average);
    }
  }
  if (!call.moments) return;
  __syncthreads();
  for (int part = 0; part < 2; ++part) {
    const int64_t job = (int64_t(blockIdx.y) * 2 + part) * gridDim.x + blockIdx.x;
    sums[part].template finish<V>(channels, A(span.count()),
                                  call.moments + moments_numbers(int(job), channels));
  }
}

}  // namespace nas::cuda
