// 1x1 convolutions of rectified inputs: a cell's preprocessing and the skip connections that reduce.
// A factorised reduction has two halves: one sees the even pixels, the other the odd ones.

#pragma once

#include "matrix.cuh"
#include "statistics.cuh"

namespace nas::cuda {

// One such convolution.
template <typename T>
struct Pointwise {
  const T* input;
  int64_t input_pitch;
  int inputs, outputs, halves;
  int height, width;              // of the input
  const Sum<T>* weights;          // [inputs][outputs]

  NAS_BOTH int out_height() const { return halves == 2 ? (height + 1) / 2 : height; }
  NAS_BOTH int out_width() const { return halves == 2 ? (width + 1) / 2 : width; }
  NAS_BOTH int first(int half) const { return half ? outputs / 2 : 0; }
  NAS_BOTH int last(int half) const { return halves == 2 && !half ? outputs / 2 : outputs; }
  // Where an output's column is in a tile: each half starts at a multiple of 4.
  NAS_BOTH int column(int c) const {
    return halves == 2 && c >= first(1) ? round_up(first(1), 4) + c - first(1) : c;
  }
  NAS_BOTH int tile_pitch() const { return row_pitch(outputs + 3); }

  // The pixel of the batch that output pixel `p` sees, or -1 beyond the border.
  NAS_DEVICE int64_t source(int half, int64_t p) const {
    if (halves == 1) return p;
    const int64_t x = p % out_width(), y = p / out_width() % out_height();
    const int64_t image = p / (out_width() * int64_t(out_height()));
    if (2 * y + half >= height || 2 * x + half >= width) return -1;
    return (image * height + 2 * y + half) * width + 2 * x + half;
  }
  // Rectified inputs of `rows` output pixels from `start` on, of which `count` exist.
  template <int V, typename A>
  NAS_DEVICE void load_rows(int half, int64_t start, int rows, int count, A* to, int pitch) const {
    const int across = inputs / V;
    for (int i = int(threadIdx.x); i < rows * across; i += kThreads) {
      const int row = i / across, channel = i % across * V;
      const int64_t pixel = row < count ? source(half, start + row) : -1;
      A values[V] = {};
      if (pixel >= 0) load<V>(input + pixel * input_pitch + channel, values);
      NAS_UNROLL for (int v = 0; v < V; ++v) to[row * pitch + channel + v] = relu(values[v]);
    }
  }
};

// Pixels that a block takes at once.
inline int pointwise_rows(int inputs, int outputs) {
  return smaller(larger(kNumbers / larger(inputs, outputs), 8), 256);
}

constexpr int kPointwiseJobs = kReducing;

template <typename T>
struct PointwiseForward {
  Pointwise<T> job[kPointwiseJobs];
  T* to[kPointwiseJobs];                 // dense [pixel][outputs]
  int count = 0, rows;
  int64_t pixels;                        // of every output
  Sum<T>* moments;

  NAS_BOTH int64_t take(Arena arena, int vector, Sum<T>** in, Sum<T>** out, Sum<T>** staged,
                        Moments<Sum<T>>* sums) const {
    int inputs = 0, outputs = 0;
    for (int i = 0; i < count; ++i) {
      inputs = larger(inputs, job[i].inputs);
      outputs = larger(outputs, job[i].outputs);
    }
    *in = arena.take<Sum<T>>(int64_t(rows) * row_pitch(inputs));
    *out = arena.take<Sum<T>>(int64_t(rows) * row_pitch(outputs + 3));
    *staged = arena.take<Sum<T>>(staged_numbers(outputs));
    *sums = Moments<Sum<T>>::take(arena, outputs, vector);
    return arena.used();
  }
};

template <typename T, int V>
NAS_KERNEL_OF(T)
    pointwise(const __grid_constant__ PointwiseForward<T> call) {
  using A = Sum<T>;
  const Pointwise<T>& job = call.job[blockIdx.y];
  A *in, *out, *staged;
  Moments<A> moments;
  call.take(Arena(shared_memory()), V, &in, &out, &staged, &moments);
  const int in_pitch = row_pitch(job.inputs), out_pitch = job.tile_pitch();
  const Share share = Share::of(job.outputs, V);
  const Span span = Span::of(divide_up(call.pixels, call.rows), int(gridDim.x), int(blockIdx.x));
  moments.template start<V>(job.outputs);
  clear_padding(in, call.rows, job.inputs, in_pitch);
  A numbers = A(0);
  for (int64_t index = span.first; index < span.last; ++index) {
    const int64_t start = index * call.rows;
    const int count = int(smaller<int64_t>(call.rows, call.pixels - start));
    for (int half = 0; half < job.halves; ++half) {
      const int first = job.first(half), columns = job.last(half) - first;
      if (!columns) continue;  // half of one
      job.template load_rows<V>(half, start, call.rows, count, in, in_pitch);
      product<T>(in, in_pitch, call.rows, job.inputs, columns,
              [&](int k, int c) { return job.weights[k * job.outputs + first + c]; }, staged,
              ToShared<A>{out + job.column(first), out_pitch, call.rows, columns});
    }
    if (index == span.first) {
      for (int c = int(threadIdx.x); c < job.outputs; c += kThreads) {
        moments.shift[c] = out[job.column(c)];
      }
      __syncthreads();
    }
    numbers += A(count);
    for (int item = int(threadIdx.x); item < share.items(); item += kThreads) {
      const int worker = item / share.across, channel = item % share.across * V;
      for (int row = worker; row < count; row += share.workers) {
        A values[V];
        NAS_UNROLL for (int v = 0; v < V; ++v) {
          values[v] = out[row * out_pitch + job.column(channel + v)];
        }
        store<V>(call.to[blockIdx.y] + (start + row) * job.outputs + channel, values);
        moments.template add<V>(worker, job.outputs, channel, values);
      }
    }
    __syncthreads();
  }
  if (!call.moments) return;
  const int64_t block = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
  moments.template finish<V>(job.outputs, numbers,
                             call.moments + moments_numbers(int(block), job.outputs));
}

// Normalises the two preprocessed inputs in place.
template <typename T, int V>
NAS_KERNEL_OF(T)
    normalise_states(Geometry g, T* states, const Sum<T>* mean, const Sum<T>* scale) {
  const int channels = int(g.shape.channels), across = channels / V;
  const int64_t count = g.input_pixels() * across, at = blockIdx.y * int64_t(channels);
  T* to = states + blockIdx.y * g.input_pixels() * channels;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kThreads) {
    const int channel = int(i % across) * V;
    Sum<T> values[V];
    load<V>(to + i * V, values);
    NAS_UNROLL for (int v = 0; v < V; ++v) {
      values[v] = (values[v] - mean[at + channel + v]) * scale[at + channel + v];
    }
    store<V>(to + i * V, values);
  }
}

}  // namespace nas::cuda
