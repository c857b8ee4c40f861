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

  // The taps of `count` pixels from `start` on, and zeros up to `rows`: to [pixel][tap].
  NAS_DEVICE void load_taps(int64_t start, int count, Sum<T>* to, int pitch) const {
    const int inputs = int(shape.inputs), width = int(shape.width), height = int(shape.height);
    for (int i = int(threadIdx.x); i < rows * taps(); i += kThreads) {
      const int row = i / taps(), tap = i % taps();
      const int64_t pixel = start + row;
      const int y = int(pixel / width % height) + tap / (3 * inputs) - 1;
      const int x = int(pixel % width) + tap / inputs % 3 - 1;
      const bool inside = row < count && y >= 0 && y < height && x >= 0 && x < width;
      const int64_t from = (pixel / width / height * height + y) * width + x;
      to[row * pitch + tap] = inside ? images[from * inputs + tap % inputs] : Sum<T>(0);
    }
  }
};

template <typename T>
struct StemConvolve {
  StemInputs<T> in;
  Sum<T>* to;        // [pixel][output]
  Sum<T>* moments;   // or null: nobody asks

  NAS_BOTH int64_t take(Arena arena, Sum<T>** taps, Sum<T>** out, Sum<T>** staged,
                        Moments<Sum<T>>* sums) const {
    *taps = arena.take<Sum<T>>(int64_t(in.rows) * row_pitch(in.taps()));
    *out = arena.take<Sum<T>>(int64_t(in.rows) * row_pitch(in.outputs()));
    *staged = arena.take<Sum<T>>(staged_numbers(in.outputs()));
    *sums = Moments<Sum<T>>::take(arena, in.outputs(), 1);
    return arena.used();
  }
};

template <typename T>
NAS_KERNEL_OF(T) stem_convolve(const __grid_constant__ StemConvolve<T> call) {
  using A = Sum<T>;
  const int taps = call.in.taps(), outputs = call.in.outputs(), rows = call.in.rows;
  const int taps_pitch = row_pitch(taps), pitch = row_pitch(outputs);
  A *in, *out, *staged;
  Moments<A> moments;
  call.take(Arena(shared_memory()), &in, &out, &staged, &moments);
  const Share share = Share::of(outputs, 1);
  const Span span =
      Span::of(divide_up(call.in.pixels(), rows), int(gridDim.x), int(blockIdx.x));
  moments.template start<1>(outputs);
  clear_padding(in, rows, taps, taps_pitch);
  A numbers = A(0);
  for (int64_t index = span.first; index < span.last; ++index) {
    const int64_t start = index * rows;
    const int count = int(smaller<int64_t>(rows, call.in.pixels() - start));
    call.in.load_taps(start, count, in, taps_pitch);
    product<T>(in, taps_pitch, rows, taps, outputs,
               [&](int k, int c) { return call.in.weights[k * outputs + c]; }, staged,
               ToShared<A>{out, pitch, rows, outputs});
    if (index == span.first) {
      for (int c = int(threadIdx.x); c < outputs; c += kThreads) moments.shift[c] = out[c];
      __syncthreads();
    }
    numbers += A(count);
    for (int item = int(threadIdx.x); item < share.items(); item += kThreads) {
      const int worker = item / share.across, channel = item % share.across;
      for (int row = worker; row < count; row += share.workers) {
        const A value[1] = {out[row * pitch + channel]};
        call.to[(start + row) * outputs + channel] = value[0];
        moments.template add<1>(worker, outputs, channel, value);
      }
    }
    __syncthreads();
  }
  if (!call.moments) return;
  moments.template finish<1>(outputs, numbers,
                             call.moments + moments_numbers(int(blockIdx.x), outputs));
}

template <typename T>
NAS_KERNEL_OF(T)
    stem_normalise(const __grid_constant__ StemForward<T, Sum<T>> call) {
  using A = Sum<T>;
  const StemShape& shape = call.shape;
  const int64_t count = shape.images * shape.pixels() * shape.outputs;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kThreads) {
    const int c = int(i % shape.outputs);
    const A factor = call.reciprocal_deviation[c] * call.weights[shape.scale() + c];
    store(call.output + i,
          (call.convolution[i] - call.mean[c]) * factor + call.weights[shape.shift() + c]);
  }
}

// Sums of the gradient, and of its product with what was normalised, less its mean: to
// [chunk][2][output].
template <typename T>
NAS_KERNEL_OF(T)
    stem_pairs(const __grid_constant__ StemBackward<T, Sum<T>> call, Sum<T>* to) {
  using A = Sum<T>;
  const int outputs = int(call.shape.outputs);
  const Share share = Share::of(outputs, 1);
  const Span span =
      Span::of(call.shape.images * call.shape.pixels(), int(gridDim.x), int(blockIdx.x));
  A* sums = reinterpret_cast<A*>(shared_memory());
  A* products = sums + share.items();
  for (int item = int(threadIdx.x); item < share.items(); item += kThreads) {
    const int worker = item / share.across, c = item % share.across;
    A sum = A(0), product = A(0);
    for (int64_t p = span.first + worker; p < span.last; p += share.workers) {
      const A gradient = load(call.output_gradient + p * outputs + c);
      sum += gradient;
      product += gradient * (call.convolution[p * outputs + c] - call.mean[c]);
    }
    sums[item] = sum;
    products[item] = product;
  }
  __syncthreads();
  to += int64_t(blockIdx.x) * 2 * outputs;
  for (int c = int(threadIdx.x); c < outputs; c += kThreads) {
    to[c] = column_sum(sums, share.workers, share.across, c);
    to[outputs + c] = column_sum(products, share.workers, share.across, c);
  }
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

  NAS_BOTH int64_t take(Arena arena, Sum<T>** taps, Sum<T>** out) const {
    const int64_t tile = int64_t(in.rows) * row_pitch(in.taps());
    *taps = arena.take<Sum<T>>(larger(tile, int64_t(kOuter)));
    *out = arena.take<Sum<T>>(int64_t(in.rows) * row_pitch(in.outputs()));
    return arena.used();
  }
};

template <typename T>
NAS_KERNEL_ALONE stem_filters(const __grid_constant__ StemFilters<T> call) {
  using A = Sum<T>;
  const int taps = call.in.taps(), outputs = call.in.outputs(), rows = call.in.rows;
  const int taps_pitch = row_pitch(taps), pitch = row_pitch(outputs);
  A *in, *out;
  call.take(Arena(shared_memory()), &in, &out);
  const Coefficients<A> coefficients{call.coefficients, outputs};
  const Span span =
      Span::of(divide_up(call.in.pixels(), rows), int(gridDim.x), int(blockIdx.x));
  MatrixGradient<T> sums(taps, outputs, outputs, call.to + int64_t(blockIdx.x) * taps * outputs);
  clear_padding(in, rows, taps, taps_pitch);
  clear_padding(out, rows, outputs, pitch);
  for (int64_t index = span.first; index < span.last; ++index) {
    const int64_t start = index * rows;
    const int count = int(smaller<int64_t>(rows, call.in.pixels() - start));
    call.in.load_taps(start, count, in, taps_pitch);
    for (int i = int(threadIdx.x); i < rows * outputs; i += kThreads) {
      const int row = i / outputs, c = i % outputs;
      const int64_t at = (start + row) * outputs + c;
      out[row * pitch + c] =
          row < count ? coefficients(load(call.gradient + at), call.convolution[at], c) : A(0);
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

template <typename T>
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
      P *taps, *out, *staged;
      Moments<P> sums;
      return work.take(Arena(nullptr), &taps, &out, &staged, &sums);
    });
    const int chunks = chunks_for(divide_up(work.in.pixels(), work.in.rows), 1);
    launch(stem_convolve<T>, {unsigned(chunks), 1, 1}, bytes, stream_, work);
    if (call_.training) {
      Settles settles;
      settles.add({0, 0, int(shape.outputs), chunks});
      launch(settle_moments<P>, {unsigned(divide_up(shape.outputs, kWarps)), 1, 1}, 0, stream_,
             settles, (const P*)moments_, call_.mean, call_.reciprocal_deviation, call_.variance);
    }
    const int64_t numbers = work.in.pixels() * shape.outputs;
    launch(stem_normalise<T>, {unsigned(smaller<int64_t>(divide_up(numbers, kThreads), 1024)), 1, 1},
           0, stream_, call_);
  }

 private:
  const StemForward<T, P>& call_;
  Stream stream_;
  Arena arena_;
  P* moments_;
};

template <typename T>
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
    launch(stem_pairs<T>, {unsigned(chunks), 1, 1},
           2 * int64_t(Share::of(outputs, 1).items()) * int64_t(sizeof(P)), stream_, call_,
           pairs_);
    launch(stem_settle<T>, {unsigned(divide_up(outputs, kWarps)), 1, 1}, 0, stream_, call_,
           (const P*)pairs_, chunks, coefficients_);
    StemFilters<T> work{{shape, call_.images, call_.weights, kStemRows},
                        call_.output_gradient,
                        call_.convolution,
                        coefficients_,
                        filters_};
    const int64_t bytes = fit_rows(work.in.rows, [&] {
      P *taps, *out;
      return work.take(Arena(nullptr), &taps, &out);
    });
    chunks = chunks_for(divide_up(pixels, work.in.rows), 1);
    launch(stem_filters<T>, {unsigned(chunks), 1, 1}, bytes, stream_, work);
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
