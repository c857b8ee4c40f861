// The stem's kernels: products of each pixel's taps with the filters, as a pointwise convolution of
// nine times as many channels that only a row's strip in the nearest cache ever sees.

#pragma once

#include "../stem.h"
#include "layout.h"

namespace nas::NAS_ISA {

template <typename S, typename T>
class Stem {
 public:
  // With a null workspace it only tells what it needs.
  Stem(const StemShape& shape, int64_t threads, void* workspace, bool backward)
      : shape_(shape),
        layout_(whole_images(shape.images, shape.outputs)),
        chunks_(shape.images),
        arena_(workspace) {
    const int64_t groups = layout_.groups, taps = shape.taps();
    padded_ = arena_.take<T>(threads * 3 * padded_row());
    strips_ = arena_.take<T>(threads * strip_size());
    rows_ = arena_.take<Vec<T>>(threads * shape.width * groups);
    merged_ = arena_.take<double>(2 * shape.outputs);
    if (backward) {
      sums_ = arena_.take<Vec<T>>(2 * shape.images * groups);
      totals_ = arena_.take<Vec<T>>(chunks_.count * groups * taps);
      coefficients_ = arena_.take<Vec<T>>(3 * groups);
    } else {
      filters_ = arena_.take<Vec<T>>(groups * taps);
      moments_ = arena_.take<Moments<T>>(shape.images * groups);
    }
  }

  int64_t workspace_bytes() const { return arena_.used(); }

  void forward(const StemForward<S, T>& call, const ThreadPool& pool) {
    pack(call.weights);
    clear_borders(pool.threads);
    each_image(pool, [&](int64_t n, int64_t, int64_t thread) { convolve(call, n, thread); });
    settle(call);
    each_image(pool, [&](int64_t n, int64_t, int64_t) { normalise(call, n); });
  }

  void backward(const StemBackward<S, T>& call, const ThreadPool& pool) {
    each_image(pool, [&](int64_t n, int64_t, int64_t) { add_up(call, n); });
    settle(call);
    clear_borders(pool.threads);
    std::fill(totals_, totals_ + chunks_.count * layout_.groups * shape_.taps(), Vec<T>::zero());
    each_image(pool, [&](int64_t n, int64_t chunk, int64_t thread) {
      filters_gradient(call, n, chunk, thread);
    });
    unpack(call.weights_gradient);
  }

 private:
  // Calls body(image, chunk, thread), the images of a chunk in their order.
  template <typename F>
  void each_image(const ThreadPool& pool, F&& body) {
    parallel(pool, chunks_.count, [&](int64_t chunk, int64_t thread) {
      for (int64_t n = chunks_.begin(chunk); n < chunks_.end(chunk); ++n) body(n, chunk, thread);
    });
  }
  // Calls f(group, channels of it, first of them).
  template <typename F>
  void each_group(F&& f) const {
    for (int64_t g = 0; g < layout_.groups; ++g) f(g, layout_.channels_of(g), g * kLanes);
  }
  int64_t row_at(int64_t n, int64_t y) const {  // in pixels
    return (n * shape_.height + y) * shape_.width;
  }
  int64_t padded_row() const { return (shape_.width + 2) * shape_.inputs + kLanes; }
  int64_t strip_size() const { return shape_.width * shape_.taps() + kLanes; }
  Vec<T>* row_of(int64_t thread) const { return rows_ + thread * shape_.width * layout_.groups; }

  void clear_borders(int64_t threads) {
    std::fill(padded_, padded_ + threads * 3 * padded_row(), T(0));
  }
  void pack(const T* weights) {
    each_group([&](int64_t g, int64_t count, int64_t first) {
      for (int64_t tap = 0; tap < shape_.taps(); ++tap) {
        filters_[g * shape_.taps() + tap] =
            load_channels(weights + tap * shape_.outputs + first, count);
      }
    });
  }

  // The taps of each pixel of row `y` side by side; beyond the image's edge they are zero.
  Channels<T> taps_of(const T* images, int64_t n, int64_t y, int64_t thread) const {
    const int64_t in = shape_.inputs, width = shape_.width, taps = shape_.taps();
    T* rows = padded_ + thread * 3 * padded_row();
    for (int64_t dy = 0; dy < 3; ++dy) {
      const int64_t from = y + dy - 1;
      T* to = rows + dy * padded_row() + in;
      if (from < 0 || from >= shape_.height) {
        std::fill(to, to + width * in, T(0));
      } else {
        std::copy_n(images + row_at(n, from) * in, width * in, to);
      }
    }
    // Whole Vecs: what one writes too much, the next one overwrites.
    T* strip = strips_ + thread * strip_size();
    for (int64_t x = 0; x < width; ++x) {
      for (int64_t dy = 0; dy < 3; ++dy) {
        const T* from = rows + dy * padded_row() + x * in;
        T* to = strip + x * taps + dy * 3 * in;
        for (int64_t k = 0; k < 3 * in; k += kLanes) Vec<T>::load(from + k).store(to + k);
      }
    }
    return {strip, taps, kLanes, taps};
  }

  void convolve(const StemForward<S, T>& call, int64_t n, int64_t thread) {
    const int64_t width = shape_.width;
    Vec<T>* out = row_of(thread);
    for (int64_t y = 0; y < shape_.height; ++y) {
      product_row(taps_of(call.images, n, y, thread), filters_, layout_.groups, {out, width}, width);
      each_group([&](int64_t g, int64_t, int64_t) {
        moments_[n * layout_.groups + g].add_row(out + g * width, width, y == 0);
      });
      T* to = call.convolution + row_at(n, y) * shape_.outputs;
      scatter(layout_, 0, out, width, width, Images<T>{to, 0, shape_.outputs});
    }
  }

  void settle(const StemForward<S, T>& call) {
    const int64_t outputs = shape_.outputs;
    const double count = double(shape_.images * shape_.pixels());
    double *mean = merged_, *variance = merged_ + outputs;
    if (call.training) merge_moments(layout_, moments_, shape_.pixels(), mean, variance);
    for (int64_t c = 0; c < outputs; ++c) {
      const double spread = call.training ? variance[c] : double(call.running_variance[c]);
      call.mean[c] = call.training ? T(mean[c]) : call.running_mean[c];
      call.reciprocal_deviation[c] = T(1 / std::sqrt(spread + kEpsilon));
      call.variance[c] = call.training ? T(spread * (count / (count - 1))) : call.running_variance[c];
    }
  }

  void normalise(const StemForward<S, T>& call, int64_t n) {
    const int64_t outputs = shape_.outputs, start = row_at(n, 0) * outputs;
    each_group([&](int64_t g, int64_t count, int64_t first) {
      const Vec<T> mean = in_lanes<T>(layout_, call.mean, g);
      const Vec<T> factor = in_lanes<T>(layout_, call.reciprocal_deviation, g) *
                            in_lanes<T>(layout_, call.weights + shape_.scale(), g);
      const Vec<T> shift = in_lanes<T>(layout_, call.weights + shape_.shift(), g);
      for (int64_t p = 0; p < shape_.pixels(); ++p) {
        const int64_t at = start + p * outputs + first;
        const Vec<T> x = load_channels(call.convolution + at, count) - mean;
        store_channels(x * factor + shift, call.output + at, count);
      }
    });
  }

  // Sums of one image's gradient, and of its product with what was normalised.
  void add_up(const StemBackward<S, T>& call, int64_t n) {
    const int64_t outputs = shape_.outputs, start = row_at(n, 0) * outputs;
    each_group([&](int64_t g, int64_t count, int64_t first) {
      const Vec<T> mean = in_lanes<T>(layout_, call.mean, g);
      Vec<T> sum = Vec<T>::zero(), product = Vec<T>::zero();
      for (int64_t p = 0; p < shape_.pixels(); ++p) {
        const int64_t at = start + p * outputs + first;
        const Vec<T> gradient = load_channels(call.output_gradient + at, count);
        sum += gradient;
        product += gradient * (load_channels(call.convolution + at, count) - mean);
      }
      sums_[n * layout_.groups + g] = sum;
      sums_[(shape_.images + n) * layout_.groups + g] = product;
    });
  }

  // The gradients of scale and shift, and a, b and d: the convolution's gradient is
  // a * gradient + b + d * (convolution - mean).
  void settle(const StemBackward<S, T>& call) {
    const int64_t outputs = shape_.outputs;
    const double each = 1.0 / double(shape_.images * shape_.pixels());
    double *sum = merged_, *product = merged_ + outputs;
    merge_sums(layout_, sums_, sum);
    merge_sums(layout_, sums_ + shape_.images * layout_.groups, product);
    const T *r = call.reciprocal_deviation, *scale = call.weights + shape_.scale();
    for (int64_t c = 0; c < outputs; ++c) {
      call.weights_gradient[shape_.shift() + c] = T(sum[c]);
      call.weights_gradient[shape_.scale() + c] = T(product[c] * double(r[c]));
      const double factor = call.training ? -double(scale[c]) * double(r[c]) * each : 0;
      sum[c] *= factor;
      product[c] *= factor * double(r[c]) * double(r[c]);
    }
    each_group([&](int64_t g, int64_t, int64_t) {
      coefficients_[3 * g] = in_lanes<T>(layout_, r, g) * in_lanes<T>(layout_, scale, g);
      coefficients_[3 * g + 1] = in_lanes<T>(layout_, sum, g);
      coefficients_[3 * g + 2] = in_lanes<T>(layout_, product, g);
    });
  }

  void filters_gradient(const StemBackward<S, T>& call, int64_t n, int64_t chunk, int64_t thread) {
    const int64_t outputs = shape_.outputs, width = shape_.width;
    Vec<T>* dy = row_of(thread);
    for (int64_t y = 0; y < shape_.height; ++y) {
      const int64_t start = row_at(n, y) * outputs;
      each_group([&](int64_t g, int64_t count, int64_t first) {
        const Vec<T> mean = in_lanes<T>(layout_, call.mean, g);
        const Vec<T>* a = coefficients_ + 3 * g;
        for (int64_t x = 0; x < width; ++x) {
          const int64_t at = start + x * outputs + first;
          Vec<T>& to = dy[g * width + x];
          to = a[0] * load_channels(call.output_gradient + at, count);
          if (!call.training) continue;
          to += a[1] + a[2] * (load_channels(call.convolution + at, count) - mean);
        }
      });
      product_weight_gradient(taps_of(call.images, n, y, thread), {dy, width}, layout_.groups, width,
                              totals_ + chunk * layout_.groups * shape_.taps());
    }
  }

  void unpack(T* gradient) const {
    each_group([&](int64_t g, int64_t count, int64_t first) {
      for (int64_t tap = 0; tap < shape_.taps(); ++tap) {
        Vec<T> total = Vec<T>::zero();
        for (int64_t chunk = 0; chunk < chunks_.count; ++chunk) {
          total += totals_[(chunk * layout_.groups + g) * shape_.taps() + tap];
        }
        store_channels(total, gradient + tap * shape_.outputs + first, count);
      }
    });
  }

  StemShape shape_;
  Layout layout_;                      // one image a block: a Vec is channels of one pixel
  Chunks chunks_;
  Arena arena_;
  T* padded_;                          // [thread][3 rows][pixel][input], with a border of zeros
  T* strips_;                          // [thread][pixel][tap]
  Vec<T>* rows_;                       // [thread][group][pixel]
  double* merged_;                     // two numbers a channel
  Vec<T>* filters_ = nullptr;          // [group][tap]
  Moments<T>* moments_ = nullptr;      // [image][group]
  Vec<T>* sums_ = nullptr;             // [gradient, product][image][group]
  Vec<T>* totals_ = nullptr;           // [chunk][group][tap]
  Vec<T>* coefficients_ = nullptr;     // [group][a, b, d]
};

}  // namespace nas::NAS_ISA
