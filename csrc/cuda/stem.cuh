// The stem, see ../stem.h: a product of each pixel's taps with the filters, and its normalisation.

#pragma once

#include "../stem.h"
#include "dots.cuh"
#include "gradient.cuh"
#include "matrix.cuh"

namespace nas::cuda {

// Images, filters, and what they give before its normalisation.
template <typename T>
struct StemInputs {
  StemShape shape;
  const Sum<T>*images, *weights;
  int rows;  // pixels that a block takes at once

  NAS_BOTH int64_t pixels() const { return shape.images * shape.pixels(); }
  NAS_BOTH int taps() const { return int(shape.taps()); }
  NAS_BOTH int outputs() const { return int(shape.outputs); }

  // Numbers of the pixels of a row, from one before the first to one after the last, in whole W.
  template <int W>
  NAS_BOTH int line() const {
    return round_up((rows + 2) * int(shape.inputs), W) + W;
  }
  NAS_BOTH int lines() const { return 3 * line<kWide<Sum<T>>>(); }

  // The taps of `count` pixels from `start` on, and zeros up to `rows`: to [pixel][tap]. Pixels lie
  // behind each other, row by row, so that those above, beside and below are three lines of the
  // images, which come first, W numbers at a time: to `lines`.
  template <int W>
  NAS_DEVICE void load_taps(int64_t start, int count, Sum<T>* lines, Sum<T>* to, int pitch) const {
    const int inputs = int(shape.inputs), width = int(shape.width), height = int(shape.height);
    const auto begin = [&](int y) { return (start + (y - 1) * width - 1) * inputs; };
    for (int y = 0; y < 3; ++y) {
      load_line<W>(begin(y) & -int64_t(W), lines + y * line<W>());
    }
    __syncthreads();
    const int first = int(start % shape.pixels());  // in its image
    for (int i = int(threadIdx.x); i < rows * taps(); i += kThreads) {
      const int row = i / taps(), tap = i % taps();
      const int up = tap / (3 * inputs), rest = tap % (3 * inputs);
      const int y = (first + row) / width % height + up - 1;
      const int x = (first + row) % width + rest / inputs - 1;
      const bool inside = row < count && y >= 0 && y < height && x >= 0 && x < width;
      const int skipped = int(begin(up) & (W - 1));
      to[row * pitch + tap] =
          inside ? lines[up * line<W>() + skipped + row * inputs + rest] : Sum<T>(0);
    }
  }

 private:
  // From number `from` of the images on, which may be before the first; zeros outside.
  template <int W>
  NAS_DEVICE void load_line(int64_t from, Sum<T>* to) const {
    const int64_t numbers = pixels() * shape.inputs;
    for (int i = int(threadIdx.x) * W; i < line<W>(); i += kThreads * W) {
      Sum<T> values[W] = {};
      if (from + i >= 0 && from + i + W <= numbers) {
        load<W>(images + from + i, values);
      } else {
        NAS_UNROLL for (int w = 0; w < W; ++w) {
          if (from + i + w >= 0 && from + i + w < numbers) values[w] = images[from + i + w];
        }
      }
      NAS_UNROLL for (int w = 0; w < W; ++w) to[i + w] = values[w];
    }
  }
};

template <typename T>
struct StemConvolve {
  StemInputs<T> in;
  Sum<T>* to;        // [pixel][output]
  Sum<T>* moments;   // or null: nobody asks

  NAS_BOTH int64_t take(Arena arena, int vector, Sum<T>** lines, Sum<T>** taps, Sum<T>** out,
                        Sum<T>** staged, Moments<Sum<T>>* sums) const {
    *lines = arena.take<Sum<T>>(in.lines());
    *taps = arena.take<Sum<T>>(int64_t(in.rows) * row_pitch(in.taps()));
    *out = arena.take<Sum<T>>(int64_t(in.rows) * row_pitch(in.outputs()));
    *staged = arena.take<Sum<T>>(staged_numbers(in.outputs()));
    *sums = Moments<Sum<T>>::take(arena, in.outputs(), vector);
    return arena.used();
  }
};

// V numbers of the outputs' images at a time, and as much as 16 bytes hold of the inputs' where V is
// not 1.
template <typename T, int V>
constexpr int kStemWide = V == 1 ? 1 : kWide<Sum<T>>;

template <typename T, int V>
NAS_KERNEL_OF(T) stem_convolve(const __grid_constant__ StemConvolve<T> call) {
  using A = Sum<T>;
  const int taps = call.in.taps(), outputs = call.in.outputs(), rows = call.in.rows;
  const int taps_pitch = row_pitch(taps), pitch = row_pitch(outputs);
  A *lines, *in, *out, *staged;
  Moments<A> moments;
  call.take(Arena(shared_memory()), V, &lines, &in, &out, &staged, &moments);
  const Share share = Share::of(outputs, V);
  const Span span =
      Span::of(divide_up(call.in.pixels(), rows), int(gridDim.x), int(blockIdx.x));
  moments.template start<V>(outputs);
  clear_padding(in, rows, taps, taps_pitch);
  A numbers = A(0);
  for (int64_t index = span.first; index < span.last; ++index) {
    const int64_t start = index * rows;
    const int count = int(smaller<int64_t>(rows, call.in.pixels() - start));
    call.in.template load_taps<kStemWide<T, V>>(start, count, lines, in, taps_pitch);
    product<T>(in, taps_pitch, rows, taps, outputs,
               [&](int k, int c) { return call.in.weights[k * outputs + c]; }, staged,
               ToShared<A>{out, pitch, rows, outputs});
    if (index == span.first) {
      for (int c = int(threadIdx.x); c < outputs; c += kThreads) moments.shift[c] = out[c];
      __syncthreads();
    }
    numbers += A(count);
    for (int item = int(threadIdx.x); item < share.items(); item += kThreads) {
      const int worker = item / share.across, channel = item % share.across * V;
      for (int row = worker; row < count; row += share.workers) {
        A values[V];
        NAS_UNROLL for (int v = 0; v < V; ++v) values[v] = out[row * pitch + channel + v];
        store<V>(call.to + (start + row) * outputs + channel, values);
        moments.template add<V>(worker, outputs, channel, values);
      }
    }
    __syncthreads();
  }
  if (!call.moments) return;
  moments.template finish<V>(outputs, numbers,
                             call.moments + moments_numbers(int(blockIdx.x), outputs));
}

template <typename T, int V>
NAS_KERNEL_OF(T)
    stem_normalise(const __grid_constant__ StemForward<T, Sum<T>> call) {
  using A = Sum<T>;
  const StemShape& shape = call.shape;
  const int64_t across = shape.outputs / V, count = shape.images * shape.pixels() * across;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kThreads) {
    const int channel = int(i % across) * V;
    A values[V];
    load<V>(call.convolution + i * V, values);
    NAS_UNROLL for (int v = 0; v < V; ++v) {
      const int c = channel + v;
      const A factor = call.reciprocal_deviation[c] * call.weights[shape.scale() + c];
      values[v] = (values[v] - call.mean[c]) * factor + call.weights[shape.shift() + c];
    }
    store<V>(call.output + i * V, values);
  }
}

// Sums of the gradient, and of its product with what was normalised, less its mean: to
// [chunk][2][output].
template <typename T, int V>
NAS_KERNEL_OF(T)
    stem_pairs(const __grid_constant__ StemBackward<T, Sum<T>> call, Sum<T>* to) {
  using A = Sum<T>;
  const int outputs = int(call.shape.outputs);
  to += int64_t(blockIdx.x) * 2 * outputs;
  sum_pairs<V>(call.shape.images * call.shape.pixels(), outputs, to,
               [&](int64_t at, int channel, A(&gradient)[V], A(&values)[V]) {
                 load<V>(call.output_gradient + at, gradient);
                 load<V>(call.convolution + at, values);
                 NAS_UNROLL for (int v = 0; v < V; ++v) values[v] -= call.mean[channel + v];
               });
}

// The gradients of scale and shift, and a, d and b of gradient.cuh, a warp a channel.
template <typename T>
NAS_KERNEL_OF(T)
    stem_settle(const __grid_constant__ StemBackward<T, Sum<T>> call, const Sum<T>* pairs,
                int chunks, Sum<T>* coefficients) {
  using P = Sum<T>;
  const StemShape& shape = call.shape;
  const int outputs = int(shape.outputs);
  const int c = int(blockIdx.x) * kWarps + int(threadIdx.x) / 32;
  if (c >= outputs) return;
  const double sum = chunk_sum(pairs + c, 2 * int64_t(outputs), chunks);
  const double product = chunk_sum(pairs + outputs + c, 2 * int64_t(outputs), chunks);
  if (threadIdx.x % 32) return;
  const double r = double(call.reciprocal_deviation[c]);
  call.weights_gradient[shape.shift() + c] = P(sum);
  call.weights_gradient[shape.scale() + c] = P(product * r);
  store_coefficients(double(call.weights[shape.scale() + c]), sum, product,
                     double(shape.images * shape.pixels()), call.training, double(call.mean[c]), r,
                     outputs, c, coefficients);
}

// The gradient of the filters: to [chunk][tap][output].
template <typename T>
struct StemFilters {
  StemInputs<T> in;
  const T* gradient;
  const Sum<T>*convolution, *coefficients;
  Sum<T>* to;

  NAS_BOTH int64_t take(Arena arena, Sum<T>** lines, Sum<T>** taps, Sum<T>** out) const {
    *lines = arena.take<Sum<T>>(in.lines());
    const int64_t tile = int64_t(in.rows) * row_pitch(in.taps());
    *taps = arena.take<Sum<T>>(larger(tile, int64_t(kOuter)));
    *out = arena.take<Sum<T>>(int64_t(in.rows) * row_pitch(in.outputs()));
    return arena.used();
  }
};

template <typename T, int V>
NAS_KERNEL_ALONE stem_filters(const __grid_constant__ StemFilters<T> call) {
  using A = Sum<T>;
  const int taps = call.in.taps(), outputs = call.in.outputs(), rows = call.in.rows;
  const int taps_pitch = row_pitch(taps), pitch = row_pitch(outputs);
  A *lines, *in, *out;
  call.take(Arena(shared_memory()), &lines, &in, &out);
  const Coefficients<A> coefficients{call.coefficients, outputs};
  const Span span =
      Span::of(divide_up(call.in.pixels(), rows), int(gridDim.x), int(blockIdx.x));
  MatrixGradient<T> sums(taps, outputs, outputs, call.to + int64_t(blockIdx.x) * taps * outputs);
  clear_padding(in, rows, taps, taps_pitch);
  clear_padding(out, rows, outputs, pitch);
  for (int64_t index = span.first; index < span.last; ++index) {
    const int64_t start = index * rows;
    const int count = int(smaller<int64_t>(rows, call.in.pixels() - start));
    call.in.template load_taps<kStemWide<T, V>>(start, count, lines, in, taps_pitch);
    const int across = outputs / V;
    for (int i = int(threadIdx.x); i < rows * across; i += kThreads) {
      const int row = i / across, c = i % across * V;
      A gradient[V] = {}, values[V];
      if (row < count) {
        const int64_t at = (start + row) * outputs + c;
        load<V>(call.gradient + at, gradient);
        load<V>(call.convolution + at, values);
        NAS_UNROLL for (int v = 0; v < V; ++v) {
          gradient[v] = coefficients(gradient[v], values[v], c + v);
        }
      }
      NAS_UNROLL for (int v = 0; v < V; ++v) out[row * pitch + c + v] = gradient[v];
    }
    __syncthreads();
    sums.add(in, taps_pitch, out, pitch, rows);
    __syncthreads();
  }
  sums.finish(in);
}

// Halves the pixels that a block takes at once until its tiles fit.
template <typename Bytes>
int64_t fit_rows(int& rows, const Bytes& bytes) {
  while (bytes() > kSharedBytes) {
    if (rows <= 8) throw std::invalid_argument("the stem has too many channels for a GPU");
    rows /= 2;
  }
  return bytes();
}
constexpr int kStemRows = 128;

template <typename T, int V>
class StemForwardPass {
  using P = Sum<T>;

 public:
  StemForwardPass(const StemForward<T, P>& call, void* workspace, Stream stream)
      : call_(call), stream_(stream), arena_(workspace) {
    moments_ = arena_.template take<P>(moments_numbers(kBlocks, int(call.shape.outputs)));
  }
  int64_t workspace_bytes() const { return arena_.used(); }

  void run() {
    const StemShape& shape = call_.shape;
    launch(keep_running<P>, {unsigned(divide_up(shape.outputs, kThreads)), 1, 1}, 0, stream_,
           shape.outputs, call_.running_mean, call_.running_variance, call_.mean,
           call_.reciprocal_deviation, call_.variance);
    StemConvolve<T> work{{shape, call_.images, call_.weights, kStemRows},
                         call_.convolution,
                         call_.training ? moments_ : nullptr};
    const int64_t bytes = fit_rows(work.in.rows, [&] {
      P *lines, *taps, *out, *staged;
      Moments<P> sums;
      return work.take(Arena(nullptr), V, &lines, &taps, &out, &staged, &sums);
    });
    const int chunks = chunks_for(divide_up(work.in.pixels(), work.in.rows), 1);
    launch(stem_convolve<T, V>, {unsigned(chunks), 1, 1}, bytes, stream_, work);
    if (call_.training) {
      Settles settles;
      settles.add({0, 0, int(shape.outputs), chunks});
      launch(settle_moments<P>, {unsigned(divide_up(shape.outputs, kWarps)), 1, 1}, 0, stream_,
             settles, (const P*)moments_, call_.mean, call_.reciprocal_deviation, call_.variance);
    }
    const unsigned blocks = blocks_for(work.in.pixels() * shape.outputs / V);
    launch(stem_normalise<T, V>, {blocks, 1, 1}, 0, stream_, call_);
  }

 private:
  const StemForward<T, P>& call_;
  Stream stream_;
  Arena arena_;
  P* moments_;
};

template <typename T, int V>
class StemBackwardPass {
  using P = Sum<T>;

 public:
  StemBackwardPass(const StemBackward<T, P>& call, void* workspace, Stream stream)
      : call_(call), stream_(stream), arena_(workspace) {
    const int64_t outputs = call.shape.outputs;
    pairs_ = arena_.template take<P>(kBlocks * 2 * outputs);
    coefficients_ = arena_.template take<P>(3 * outputs);
    filters_ = arena_.template take<P>(kBlocks * call.shape.taps() * outputs);
  }
  int64_t workspace_bytes() const { return arena_.used(); }

  void run() {
    const StemShape& shape = call_.shape;
    const int outputs = int(shape.outputs);
    const int64_t pixels = shape.images * shape.pixels();
    int chunks = chunks_for(divide_up(pixels * outputs, kNumbers), 1);
    launch(stem_pairs<T, V>, {unsigned(chunks), 1, 1}, pairs_bytes<P>(outputs, V), stream_, call_,
           pairs_);
    launch(stem_settle<T>, {unsigned(divide_up(outputs, kWarps)), 1, 1}, 0, stream_, call_,
           (const P*)pairs_, chunks, coefficients_);
    StemFilters<T> work{{shape, call_.images, call_.weights, kStemRows},
                        call_.output_gradient,
                        call_.convolution,
                        coefficients_,
                        filters_};
    const int64_t bytes = fit_rows(work.in.rows, [&] {
      P *lines, *taps, *out;
      return work.take(Arena(nullptr), &lines, &taps, &out);
    });
    chunks = chunks_for(divide_up(pixels, work.in.rows), 1);
    launch(stem_filters<T, V>, {unsigned(chunks), 1, 1}, bytes, stream_, work);
    AddChunks<P> added;
    added.add(filters_, call_.weights_gradient, chunks, shape.taps() * outputs);
    launch(add_chunks<P>, {unsigned(divide_up(added.most, kThreads)), 1, 1}, 0, stream_, added);
  }

 private:
  const StemBackward<T, P>& call_;
  Stream stream_;
  Arena arena_;
  P *pairs_, *coefficients_, *filters_;
};

}  // namespace nas::cuda
