// Backward through normalisations and separable convolutions.
//
// The gradient of what a convolution gave, y, is  a g + d y + b  with one a, d and b a channel:
//
//   a = w r,   d = -w r^3 <g, y - m> / M,   b = -w r <g, 1> / M - d m
//
// where g is the gradient of what it was normalised to, w the mixing weight, r the reciprocal
// deviation, m the mean and M the numbers of a channel (in evaluation d = b = 0). Two launches
// follow: through the pointwise part (pointwise_gradient.cuh); then through the depthwise part.

#pragma once

#include "convolve.cuh"

namespace nas::cuda {

// a, d and b of one normalisation: [3][channels].
template <typename A>
struct Coefficients {
  const A* at;
  int channels;

  NAS_DEVICE A operator()(A gradient, A y, int channel) const {
    return at[channel] * gradient + (at[channels + channel] * y + at[2 * channels + channel]);
  }
};

// Through the depthwise parts of an edge's convolutions, tile by tile of their input.
template <typename T>
struct DepthwiseGradient {
  Inputs<T> in;
  int count = 0;                      // of blockIdx.y
  uint8_t first[2 * kSources], last[2 * kSources];  // the jobs that a block takes one after another
  Jobs jobs;
  Tiling tiling;                      // of the input
  int stride, halo;                   // of the jobs, the largest
  const Sum<T>* depthwise;            // [job]: what pointwise_gradient gave
  Sum<T>* to;                         // [source]: added to; or [source][3 or 5]: written
  bool second;                        // the jobs are second convolutions
  int64_t at[kSources];               // of a source's plane in `to`
  Sum<T>* taps;                       // [job][chunk][taps][channels], or null: nobody asks
  int64_t taps_at[kEdges * kConvolutions];  // of each job
  Sum<T>* pairs;                      // of second ones [job][chunk][2][channels]
};

// The border of a tile of gradients that a tile of inputs needs, in outputs.
NAS_BOTH int gradient_halo(const Steps& s) { return (s.padding() + s.stride - 1) / s.stride; }
NAS_BOTH Region gradient_region(int rows, int columns, int slab, int stride, int halo) {
  Region region = Region::of(1, 1, slab, 1, 1, 0);
  region.rows = round_up(rows, kSide) / stride + 2 * halo;
  region.columns = round_up(columns, kSide) / stride + 2 * halo;
  region.pitch = region.columns | 1;
  return region;
}

// A tile of inputs, without a border.
NAS_BOTH Region input_region(const Tiling& t) {
  Region region = Region::of(1, 1, t.slab, 1, 1, 0);
  region.rows = t.rows;
  region.columns = region.pitch = t.columns;
  return region;
}

template <typename A>
struct DepthwiseGradientMemory {
  A* region;  // later what each thread adds to the gradients of its taps
  A* inputs;  // then their gradients

  NAS_BOTH static DepthwiseGradientMemory take(Arena& arena, const Tiling& t, int stride,
                                               int halo) {
    const Region region = gradient_region(t.rows, t.columns, t.slab, stride, halo);
    return {arena.take<A>(larger<int64_t>(region.numbers(t.images), kThreads * 25)),
            arena.take<A>(input_region(t).numbers(t.images))};
  }
};

// 4 x 4 inputs of a depthwise convolution: their gradient, and what they add to those of the taps.
// `from` is the output that the first of them meets, less the border.
template <int kSize, int kDilation, int kStride, bool kTaps, typename A>
NAS_DEVICE void depthwise_gradient_block(const A* from, int row, int column,
                                         const A (&taps)[kSize * kSize],
                                         const A (&x)[kSide][kSide], A (&sum)[kSide][kSide],
                                         A (&gradient)[kSize * kSize]) {
  constexpr int kPadding = kSize / 2 * kDilation, kHalo = (kPadding + kStride - 1) / kStride;
  constexpr int kSpan = kSide / kStride + 2 * kHalo;
  NAS_UNROLL for (int r = 0; r < kSpan; ++r) {
    NAS_KEEP_ORDER;
    A in[kSpan];
    const A* at = from;
    NAS_UNROLL for (int c = 0; c < kSpan; ++c) {
      in[c] = *at;
      at += column;
    }
    from += row;
    NAS_UNROLL for (int i = 0; i < kSide; ++i) {
      // output r is the one that tap k of input i belongs to: i + padding - k dilation = stride out
      const int distance = i + kPadding - (r - kHalo) * kStride;
      if (distance < 0 || distance % kDilation || distance / kDilation >= kSize) continue;
      const int tap = distance / kDilation * kSize;
      NAS_UNROLL for (int j = 0; j < kSide; ++j) {
        NAS_UNROLL for (int k = 0; k < kSize; ++k) {
          const int place = j + kPadding - k * kDilation + kHalo * kStride;
          if (place % kStride) continue;
          const A value = in[place / kStride];
          sum[i][j] += value * taps[tap + k];
          if (kTaps) gradient[tap + k] += value * x[i][j];
        }
      }
    }
  }
}

// What a tile of inputs gets: added to the plane, or with `second` written there.
template <int V, typename A>
NAS_DEVICE void store_inputs(const Region& region, const Tiling& t, const Tile& tile, int slab,
                             bool second, const A* from, A* to, int channels) {
  for_region<V>(region, t, Part::of(t, tile), slab, [&](int at, int64_t pixel, int channel) {
    if (pixel < 0) return;
    A values[V] = {};
    A* place = to + pixel * channels + channel;
    if (!second) load<V>(place, values);
    NAS_UNROLL for (int v = 0; v < V; ++v) values[v] += from[at + v];
    store<V>(place, values);
  });
}

// 4 x 4 inputs of a tile: the first of them, and how many are in the plane.
struct Inner {
  int image, y, x, rows, columns;
};

// Calls f(i, j, number) for those of them that are in the plane; `from` has a tile of inputs.
template <typename A, typename F>
NAS_DEVICE void for_own(const Inner& inner, const Tiling& t, const Region& inputs, A* from,
                        const F& f) {
  from += ((inner.image * t.rows + inner.y) * t.columns + inner.x) * inputs.cell;
  NAS_UNROLL for (int i = 0; i < kSide; ++i) {
    NAS_UNROLL for (int j = 0; j < kSide; ++j) {
      if (i < inner.rows && j < inner.columns) f(i, j, *from);
      from += inputs.cell;
    }
    from += (t.columns - kSide) * inputs.cell;
  }
}

// All tiles of a block for one job and one slab of channels.
template <int kSize, int kDilation, int kStride, bool kTaps, int V, typename T>
NAS_DEVICE void depthwise_gradient_slab(const DepthwiseGradient<T>& call, int job, int first,
                                        const DepthwiseGradientMemory<Sum<T>>& shared) {
  using A = Sum<T>;
  constexpr int kHalo = (kSize / 2 * kDilation + kStride - 1) / kStride;
  constexpr bool kPairs = kDilation == 1 && kStride == 1;  // as second convolutions are
  const Geometry& g = call.in.g;
  const Tiling& t = call.tiling;
  const int channels = g.channels(), slab = smaller(t.slab, channels - first);
  const int edge = call.jobs.edge[job], convolution = call.jobs.convolution[job];
  const int s = source_of(edge);
  const Region region = gradient_region(t.rows, t.columns, t.slab, kStride, kHalo);
  const Region inputs = input_region(t);
  A* memory = shared.region;
  A* own = shared.inputs + int(threadIdx.x) % slab;
  const int worker = int(threadIdx.x) / slab, workers = kThreads / slab;
  const int lane = int(threadIdx.x) % slab;
  const bool mine = worker < workers;
  const A* from = call.depthwise + job * g.plane();
  const A* weights = call.in.weights + Taps::of(convolution).at(g, edge) + first + lane;
  A* to = call.to + (call.second ? (2 * s + convolution / 2) * g.plane() : call.at[s]) + first;
  A taps[kSize * kSize], gradient[kSize * kSize] = {}, total = A(0), products = A(0);
  if (mine) {
    NAS_UNROLL for (int k = 0; k < kSize * kSize; ++k) taps[k] = weights[k * channels];
  }
  const Span span = Span::of(t.tiles(), int(gridDim.x), int(blockIdx.x));
  const int down = (t.rows + kSide - 1) / kSide, across = (t.columns + kSide - 1) / kSide;
  for (int64_t index = span.first; index < span.last; ++index) {
    const Tile tile = Tile::of(t, index);
    __syncthreads();
    const Part part{tile.image, tile.images, tile.y / kStride - kHalo, tile.x / kStride - kHalo,
                    g.node_height(), g.node_width()};
    load_region<V>(region, t, part, first, slab, memory, [&](int64_t pixel, int c, A(&values)[V]) {
      load<V>(from + pixel * channels + c, values);
    });
    call.in.with_input(edge, convolution, [&](const auto& read) {
      load_region<V>(inputs, t, Part::of(t, tile), first, slab, shared.inputs, read);
    });
    __syncthreads();
    const int blocks = mine ? tile.images * down * across : 0;
    for (int block = worker; block < blocks; block += workers) {
      const auto find = [&] {
        NAS_FORGET(block);  // what follows from it is found twice, not kept
        const int x = block % across * kSide, y = block / across % down * kSide;
        return Inner{block / across / down, y, x, tile.rows - y, tile.columns - x};
      };
      const Inner inner = find();
      if (inner.rows <= 0 || inner.columns <= 0) continue;
      A x[kSide][kSide] = {}, sum[kSide][kSide] = {};
      if (kTaps) {
        for_own(inner, t, inputs, own, [&](int i, int j, A& at) { x[i][j] = at; });
      }
      const int origin = (inner.image * region.rows + inner.y / kStride) * region.pitch +
                         inner.x / kStride;
      depthwise_gradient_block<kSize, kDilation, kStride, kTaps>(
          memory + origin * region.cell + lane, region.pitch * region.cell, region.cell, taps, x,
          sum, gradient);
      for_own(find(), t, inputs, own, [&](int i, int j, A& at) {
        const A input = at;
        at = relu_gradient(sum[i][j], input);
        if (!kPairs) return;
        total += at;
        products += at * input;  // where it is not zero, the input is what was normalised
      });
    }
    __syncthreads();
    store_inputs<V>(inputs, t, tile, slab, call.second, shared.inputs, to, channels);
  }

  const int64_t block = blockIdx.x;
  const auto add_up = [&](int numbers, const auto& value_of, A* out) {
    __syncthreads();
    if (mine) {
      NAS_UNROLL for (int k = 0; k < kSize * kSize; ++k) {
        if (k < numbers) memory[(k * workers + worker) * slab + lane] = value_of(k);
      }
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < numbers * slab; i += kThreads) {
      const int k = i / slab, c = i % slab;
      out[k * channels + first + c] = column_sum(memory + k * workers * slab, workers, slab, c);
    }
  };
  if (kTaps) {
    add_up(kSize * kSize, [&](int k) { return gradient[k]; },
           call.taps + call.taps_at[job] + block * kSize * kSize * channels);
  }
  if (kPairs && call.second) {
    add_up(2, [&](int k) { return k ? products : total; },
           call.pairs + (job * int64_t(gridDim.x) + block) * 2 * channels);
  }
}

template <bool kTaps, int V, typename T>
NAS_DEVICE void depthwise_gradient_job(const DepthwiseGradient<T>& call, int job, int first,
                                       const DepthwiseGradientMemory<Sum<T>>& memory) {
  const Steps steps = call.in.steps(call.jobs.edge[job], call.jobs.convolution[job]);
  const int kind = (steps.size == 5) * 4 + (steps.dilation == 2) * 2 + (steps.stride == 2);
  switch (kind) {
    case 0: return depthwise_gradient_slab<3, 1, 1, kTaps, V>(call, job, first, memory);
    case 1: return depthwise_gradient_slab<3, 1, 2, kTaps, V>(call, job, first, memory);
    case 2: return depthwise_gradient_slab<3, 2, 1, kTaps, V>(call, job, first, memory);
    case 3: return depthwise_gradient_slab<3, 2, 2, kTaps, V>(call, job, first, memory);
    case 4: return depthwise_gradient_slab<5, 1, 1, kTaps, V>(call, job, first, memory);
    case 5: return depthwise_gradient_slab<5, 1, 2, kTaps, V>(call, job, first, memory);
    case 6: return depthwise_gradient_slab<5, 2, 1, kTaps, V>(call, job, first, memory);
    default: return depthwise_gradient_slab<5, 2, 2, kTaps, V>(call, job, first, memory);
  }
}

template <typename T, int V, bool kTaps>
NAS_KERNEL_ALONE
    depthwise_gradient(const __grid_constant__ DepthwiseGradient<T> call) {
  Arena arena(shared_memory());
  const auto memory =
      DepthwiseGradientMemory<Sum<T>>::take(arena, call.tiling, call.stride, call.halo);
  const int channels = call.in.g.channels();
  for (int job = call.first[blockIdx.y]; job < call.last[blockIdx.y]; ++job) {
    for (int first = 0; first < channels; first += call.tiling.slab) {
      depthwise_gradient_job<kTaps, V>(call, job, first, memory);
    }
  }
}

}  // namespace nas::cuda
