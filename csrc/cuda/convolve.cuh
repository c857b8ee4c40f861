// Depthwise and pointwise convolution of tiles, with the sums that its normalisation needs.

#pragma once

#include "product.cuh"
#include "statistics.cuh"

namespace nas::cuda {

// The rectified input of a first convolution.
template <typename T>
struct Rectified {
  Plane<const T> state;

  template <int V>
  NAS_DEVICE void operator()(int64_t pixel, int channel, Sum<T> (&values)[V]) const {
    load<V>(state.pixel(pixel) + channel, values);
    NAS_UNROLL for (int v = 0; v < V; ++v) values[v] = relu(values[v]);
  }
};

// That of a second one: what the first gave, normalised and rectified.
template <typename T>
struct NormalisedAndRectified {
  Plane<const T> plane;
  const Sum<T>*mean, *scale;

  template <int V>
  NAS_DEVICE void operator()(int64_t pixel, int channel, Sum<T> (&values)[V]) const {
    load<V>(plane.pixel(pixel) + channel, values);
    NAS_UNROLL for (int v = 0; v < V; ++v) {
      values[v] = relu((values[v] - mean[channel + v]) * scale[channel + v]);
    }
  }
};

// What an edge's convolutions read.
template <typename T>
struct Inputs {
  Geometry g;
  const T *states, *output;   // see cell.h
  const T *kept, *seconds;    // planes of first convolutions, and of second ones of one node
  const Sum<T>*mean, *reciprocal_deviation;
  const Sum<T>* weights;

  NAS_DEVICE Plane<const T> plane(int edge, int convolution) const {
    return {is_second(convolution) ? seconds + g.second_convolution(edge, convolution)
                                   : kept + g.first_convolution(edge, convolution),
            g.channels()};
  }
  // Calls f(reader) with what gives the input of a convolution.
  template <typename F>
  NAS_DEVICE void with_input(int edge, int convolution, F&& f) const {
    if (is_second(convolution)) {
      const int64_t at = g.shape.convolution_statistics(edge, convolution - 1);
      f(NormalisedAndRectified<T>{plane(edge, convolution - 1), mean + at,
                                  reciprocal_deviation + at});
    } else {
      f(Rectified<T>{g.state(states, output, source_of(edge))});
    }
  }
  NAS_BOTH Steps steps(int edge, int convolution) const {
    const Taps taps = Taps::of(convolution);
    return {taps.size, taps.dilation, is_second(convolution) ? 1 : g.stride(source_of(edge))};
  }
  NAS_BOTH int input_height(int edge, int convolution) const {
    return is_second(convolution) ? g.node_height() : g.state_height(source_of(edge));
  }
  NAS_BOTH int input_width(int edge, int convolution) const {
    return is_second(convolution) ? g.node_width() : g.state_width(source_of(edge));
  }
};

// The depthwise outputs of one tile of a convolution: to [pixel][channel]. `region` is scratch.
template <int V, typename T>
NAS_DEVICE void depthwise_outputs(const Inputs<T>& in, int edge, int convolution, const Tiling& t,
                                  const Tile& tile, Sum<T>* scratch, Sum<T>* to, int pitch) {
  using A = Sum<T>;
  const int channels = in.g.channels();
  const Steps steps = in.steps(edge, convolution);
  const Region region = steps.region(t);
  const A* taps = in.weights + Taps::of(convolution).at(in.g, edge);
  for (int first = 0; first < channels; first += t.slab) {
    const int slab = smaller(t.slab, channels - first);
    in.with_input(edge, convolution, [&](const auto& read) {
      load_region<V>(region, t, tile.image, tile.images, tile.y * steps.stride - steps.padding(),
                     tile.x * steps.stride - steps.padding(), in.input_height(edge, convolution),
                     in.input_width(edge, convolution), first, slab, scratch, read);
    });
    __syncthreads();
    depthwise_tile(region, t, steps, scratch, slab, taps + first, channels, to + first, pitch);
    __syncthreads();
  }
}

template <typename A>
struct ConvolveMemory {
  A *scratch, *depthwise, *staged;
  Moments<A> moments;

  // `scratch` is the input first and the output then.
  NAS_BOTH static ConvolveMemory take(Arena& arena, const Tiling& t, int64_t input, int channels,
                                      int vector) {
    const int64_t tile = int64_t(t.pixels()) * row_pitch(channels);
    ConvolveMemory memory;
    memory.scratch = arena.take<A>(larger(input, tile));
    memory.depthwise = arena.take<A>(tile);
    memory.staged = arena.take<A>(staged_numbers(channels));
    memory.moments = Moments<A>::take(arena, channels, vector);
    return memory;
  }
};

// Convolutions of one launch.
template <typename T>
struct Convolve {
  Inputs<T> in;
  Jobs jobs;
  Tiling tiling;
  int64_t input;     // numbers of the largest input of a tile
  T* to;             // planes of first convolutions, or of second ones
  Sum<T>* moments;   // of each job, or null where nobody asks
};

template <typename T, int V>
NAS_KERNEL_ALONE convolve(const __grid_constant__ Convolve<T> call) {
  using A = Sum<T>;
  const Tiling& t = call.tiling;
  const int channels = call.in.g.channels(), pitch = row_pitch(channels);
  const int edge = call.jobs.edge[blockIdx.y], convolution = call.jobs.convolution[blockIdx.y];
  Arena arena(shared_memory());
  const auto memory = ConvolveMemory<A>::take(arena, t, call.input, channels, V);
  const A* matrix = call.in.weights + matrix_at(call.in.g, edge, convolution);
  T* to = call.to + (is_second(convolution) ? call.in.g.second_convolution(edge, convolution)
                                            : call.in.g.first_convolution(edge, convolution));
  const Share share = Share::of(channels, V);
  const Span span = Span::of(t.tiles(), int(gridDim.x), int(blockIdx.x));

  memory.moments.template start<V>(channels);
  clear_padding(memory.depthwise, t.pixels(), channels, pitch);
  A count = A(0);
  for (int64_t index = span.first; index < span.last; ++index) {
    const Tile tile = Tile::of(t, index);
    depthwise_outputs<V>(call.in, edge, convolution, t, tile, memory.scratch, memory.depthwise,
                         pitch);
    product<T>(memory.depthwise, pitch, t.pixels(), channels, channels,
            [&](int k, int c) { return matrix[k * channels + c]; }, memory.staged, memory.scratch,
            pitch);
    if (index == span.first) {
      for (int c = int(threadIdx.x); c < channels; c += kThreads) {
        memory.moments.shift[c] = memory.scratch[c];
      }
      __syncthreads();
    }
    count += A(tile.images * tile.rows * tile.columns);
    for (int item = int(threadIdx.x); item < share.items(); item += kThreads) {
      const int worker = item / share.across, channel = item % share.across * V;
      for (int p = worker; p < t.pixels(); p += share.workers) {
        const Pixel pixel = Pixel::of(t, tile, p);
        if (!pixel.inside) continue;
        A values[V];
        NAS_UNROLL for (int v = 0; v < V; ++v) values[v] = memory.scratch[p * pitch + channel + v];
        store<V>(to + pixel.at * channels + channel, values);
        memory.moments.template add<V>(worker, channels, channel, values);
      }
    }
    __syncthreads();
  }
  if (!call.moments) return;
  const int64_t job = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
  memory.moments.template finish<V>(channels, count,
                                    call.moments + moments_numbers(int(job), channels));
}

}  // namespace nas::cuda
