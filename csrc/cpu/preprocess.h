// The two convolutions that bring a cell's inputs to its number of channels and its resolution:
// ReLU, pointwise convolution (factorised reduction where the input is twice as large), batch
// normalisation. Backward needs nothing but the normalised states.

#pragma once

#include "edge.h"

namespace nas::NAS_ISA {

constexpr int64_t kStrip = 64;  // pixels that are taken together, so that they stay in cache

// Writes one normalisation's statistics out; `count` numbers a channel made them.
template <typename T>
void store_statistics(const CellForward<T>& call, int64_t at, int64_t channels, int64_t count,
                      const double* mean, const double* variance) {
  for (int64_t c = 0; c < channels; ++c) {
    call.mean[at + c] = T(mean[c]);
    call.reciprocal_deviation[at + c] = T(1 / std::sqrt(variance[c] + kEpsilon));
    call.variance[at + c] = T(variance[c] * (double(count) / double(count - 1)));
  }
}

template <typename T>
class Preprocess {
 public:
  Preprocess(const CellShape& shape, int64_t threads, Arena& arena, bool transposed)
      : shape_(shape), geometry_(shape) {
    const int64_t most = std::max(shape.before_channels, shape.previous_channels);
    const int64_t wide = geometry_.wide.groups;
    for (int which = 0; which < 2; ++which) {
      const int64_t in = channels(which), in_groups = (in + kLanes - 1) / kLanes;
      weights_[which] = arena.take<Vec<T>>(halves(which) * wide * in);
      if (!transposed) continue;
      transposed_[which] = arena.take<Vec<T>>(halves(which) * in_groups * shape.channels);
      weight_sums_[which] =
          arena.take<Vec<T>>(geometry_.chunks.count * halves(which) * wide * in);
      sums_[which] = arena.take<Vec<T>>(2 * shape.images * wide);
    }
    moments_ = arena.take<Moments<T>>(2 * shape.images * wide);
    in_size_ = kStrip * ((most + kLanes - 1) / kLanes) * kLanes;
    in_ = arena.take<T>(threads * in_size_);
    out_size_ = kStrip * wide;
    out_ = arena.take<Vec<T>>(threads * out_size_);
    coefficients_ = arena.take<Vec<T>>(2 * 3 * wide);
    if (transposed) merged_ = arena.take<double>(2 * 2 * shape.channels);
  }

  void forward(const CellForward<T>& call, const ThreadPool& pool, double* merged) {
    const auto& g = geometry_;
    for (int which = 0; which < 2; ++which) pack(call.weights, which);
    parallel(pool, 2 * g.chunks.count, [&](int64_t unit, int64_t thread) {
      convolve_images(call, int(unit % 2), unit / 2, thread);
    });
    for (int which = 0; which < 2; ++which) {
      const int64_t at = shape_.preprocess_statistics(which);
      if (call.training) {
        merge_moments(g.wide, moments_ + which * shape_.images * g.wide.groups, g.pixels, merged,
                      merged + shape_.channels);
        store_statistics(call, at, shape_.channels, shape_.images * g.pixels, merged,
                         merged + shape_.channels);
      }
      for (int64_t group = 0; group < g.wide.groups; ++group) {
        Vec<T>* to = coefficients_ + which * 3 * g.wide.groups + group;
        to[0] = in_lanes<T>(g.wide, call.mean + at, group);
        to[g.wide.groups] = in_lanes<T>(g.wide, call.reciprocal_deviation + at, group);
      }
    }
    parallel(pool, 2 * g.chunks.count, [&](int64_t unit, int64_t) {
      normalise(call.states, int(unit % 2), unit / 2);
    });
  }

  // `gradients` [2, N, H, W, C], of the normalised states.
  void backward(const CellBackward<T>& call, const T* gradients, const ThreadPool& pool) {
    const auto& g = geometry_;
    parallel(pool, 2 * g.chunks.count, [&](int64_t unit, int64_t) {
      add_up(call.states, gradients, int(unit % 2), unit / 2);
    });
    for (int which = 0; which < 2; ++which) {
      pack_transposed_halves(call.weights, which);
      settle_gradient(call, which);
    }
    parallel(pool, 2 * g.chunks.count, [&](int64_t unit, int64_t thread) {
      convolve_back(call, gradients, int(unit % 2), unit / 2, thread);
    });
    if (!call.weights_gradient) return;
    for (int which = 0; which < 2; ++which) {
      unpack(which, call.weights_gradient + shape_.preprocess(which));
    }
  }

 private:
  int64_t channels(int which) const {
    return which ? shape_.previous_channels : shape_.before_channels;
  }
  int halves(int which) const { return which == 0 && shape_.previous_reduction ? 2 : 1; }
  // Columns of the weights that half `half` makes: the other half of the outputs gets nothing.
  int64_t first_column(int which, int half) const {
    return halves(which) == 2 && half ? shape_.channels / 2 : 0;
  }
  int64_t last_column(int which, int half) const {
    return halves(which) == 2 && !half ? shape_.channels / 2 : shape_.channels;
  }

  void pack(const T* weights, int which) {
    const T* from = weights + shape_.preprocess(which);
    const int64_t in = channels(which), out = shape_.channels;
    for (int half = 0; half < halves(which); ++half) {
      T* to = reinterpret_cast<T*>(weights_[which] + half * geometry_.wide.groups * in);
      std::fill(to, to + geometry_.wide.groups * in * kLanes, T(0));
      for (int64_t i = 0; i < in; ++i) {
        for (int64_t o = first_column(which, half); o < last_column(which, half); ++o) {
          to[(o / kLanes * in + i) * kLanes + o % kLanes] = from[i * out + o];
        }
      }
    }
  }
  void pack_transposed_halves(const T* weights, int which) {
    const T* from = weights + shape_.preprocess(which);
    const int64_t in = channels(which), out = shape_.channels;
    const int64_t in_groups = (in + kLanes - 1) / kLanes;
    for (int half = 0; half < halves(which); ++half) {
      T* to = reinterpret_cast<T*>(transposed_[which] + half * in_groups * out);
      std::fill(to, to + in_groups * out * kLanes, T(0));
      for (int64_t i = 0; i < in; ++i) {
        for (int64_t o = first_column(which, half); o < last_column(which, half); ++o) {
          to[(i / kLanes * out + o) * kLanes + i % kLanes] = from[i * out + o];
        }
      }
    }
  }

  const T* input(const T* before, const T* previous, int which, int64_t image) const {
    if (which) return previous + image * geometry_.pixels * shape_.previous_channels;
    return before + image * shape_.before_height * shape_.before_width * shape_.before_channels;
  }

  // Where state pixel `p` looks at in the input of one half; -1 beyond its edge.
  int64_t source(int which, int half, int64_t p) const {
    if (halves(which) == 1) return p;
    const int64_t y = 2 * (p / geometry_.width) + half, x = 2 * (p % geometry_.width) + half;
    return y < shape_.before_height && x < shape_.before_width ? y * shape_.before_width + x : -1;
  }

  // relu of the input pixels behind a strip of state pixels, [pixel][channel].
  Channels<T> rectified(const T* image, int which, int half, int64_t p, int64_t count, T* to) const {
    const int64_t in = channels(which);
    const auto copy = [](const T* from, int64_t numbers, T* into) {
      for (int64_t i = 0; i < numbers; ++i) into[i] = from[i] < 0 ? T(0) : from[i];
    };
    if (halves(which) == 1) {
      copy(image + p * in, count * in, to);
      return {to, in, kLanes, in};
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = source(which, half, p + i);
      if (from < 0) {
        std::fill(to + i * in, to + (i + 1) * in, T(0));
      } else {
        copy(image + from * in, in, to + i * in);
      }
    }
    return {to, in, kLanes, in};
  }

  void convolve_images(const CellForward<T>& call, int which, int64_t chunk, int64_t thread) {
    const auto& g = geometry_;
    Vec<T>* out = out_ + thread * out_size_;
    for (int64_t n = g.first_image(chunk); n < g.last_image(chunk); ++n) {
      const T* image = input(call.before, call.previous, which, n);
      T* state = call.states + (which * shape_.images + n) * g.pixels * shape_.channels;
      Moments<T>* moments = moments_ + (which * shape_.images + n) * g.wide.groups;
      for (int64_t p = 0; p < g.pixels; p += kStrip) {
        const int64_t count = std::min(kStrip, g.pixels - p);
        for (int half = 0; half < halves(which); ++half) {
          const auto in =
              rectified(image, which, half, p, count, in_ + thread * in_size_);
          product_row(in, weights_[which] + half * g.wide.groups * in.count, g.wide.groups, out,
                      kStrip, count, half > 0);
        }
        for (int64_t group = 0; group < g.wide.groups; ++group) {
          moments[group].add_row(out + group * kStrip, count, p == 0);
        }
        scatter(g.wide, 0, out, kStrip, count,
                Images<T>{state + p * shape_.channels, 0, shape_.channels});
      }
    }
  }

  void normalise(T* states, int which, int64_t chunk) {
    const auto& g = geometry_;
    const Vec<T>* mean = coefficients_ + which * 3 * g.wide.groups;
    for (int64_t n = g.first_image(chunk); n < g.last_image(chunk); ++n) {
      T* state = states + (which * shape_.images + n) * g.pixels * shape_.channels;
      for (int64_t p = 0; p < g.pixels; ++p) {
        for (int64_t group = 0; group < g.wide.groups; ++group) {
          T* at = state + p * shape_.channels + group * kLanes;
          const int64_t count = g.wide.channels_of(group);
          const Vec<T> x = load_channels<T>(at, count);
          store_channels((x - mean[group]) * mean[g.wide.groups + group], at, count);
        }
      }
    }
  }

  // Sums of the gradient and of its product with the normalised state.
  void add_up(const T* states, const T* gradients, int which, int64_t chunk) {
    const auto& g = geometry_;
    for (int64_t n = g.first_image(chunk); n < g.last_image(chunk); ++n) {
      const int64_t image = (which * shape_.images + n) * g.pixels * shape_.channels;
      for (int64_t group = 0; group < g.wide.groups; ++group) {
        const int64_t count = g.wide.channels_of(group);
        Vec<T> sum = Vec<T>::zero(), product = Vec<T>::zero();
        for (int64_t p = 0; p < g.pixels; ++p) {
          const int64_t at = image + p * shape_.channels + group * kLanes;
          const Vec<T> gradient = load_channels(gradients + at, count);
          sum += gradient;
          product += gradient * load_channels(states + at, count);
        }
        sums_[which][n * g.wide.groups + group] = sum;
        sums_[which][(shape_.images + n) * g.wide.groups + group] = product;
      }
    }
  }

  // Coefficients of: convolution's gradient = a * gradient + b + d * state.
  void settle_gradient(const CellBackward<T>& call, int which) {
    const auto& g = geometry_;
    const int64_t at = shape_.preprocess_statistics(which);
    double *sum = merged_, *product = merged_ + shape_.channels;
    merge_sums(g.wide, sums_[which], sum);
    merge_sums(g.wide, sums_[which] + shape_.images * g.wide.groups, product);
    const double each = call.training ? 1.0 / double(shape_.images * g.pixels) : 0.0;
    for (int64_t c = 0; c < shape_.channels; ++c) {
      const double scale = double(call.reciprocal_deviation[at + c]);
      sum[c] *= -scale * each;
      product[c] *= -scale * each;
    }
    for (int64_t group = 0; group < g.wide.groups; ++group) {
      Vec<T>* to = coefficients_ + which * 3 * g.wide.groups + group;
      to[0] = in_lanes<T>(g.wide, call.reciprocal_deviation + at, group);
      to[g.wide.groups] = in_lanes<T>(g.wide, sum, group);
      to[2 * g.wide.groups] = in_lanes<T>(g.wide, product, group);
    }
  }

  void convolve_back(const CellBackward<T>& call, const T* gradients, int which, int64_t chunk,
                     int64_t thread) {
    const auto& g = geometry_;
    const int64_t in = channels(which), in_groups = (in + kLanes - 1) / kLanes;
    Vec<T>* totals = weight_sums_[which] + chunk * halves(which) * g.wide.groups * in;
    std::fill(totals, totals + halves(which) * g.wide.groups * in, Vec<T>::zero());
    T* wanted = which ? call.previous_gradient : call.before_gradient;
    if (!wanted && !call.weights_gradient) return;
    Vec<T>* dy = out_ + thread * out_size_;
    T* strip = in_ + thread * in_size_;
    const Vec<T>* scale = coefficients_ + which * 3 * g.wide.groups;
    for (int64_t n = g.first_image(chunk); n < g.last_image(chunk); ++n) {
      const T* image = input(call.before, call.previous, which, n);
      const int64_t size = (which ? g.pixels : shape_.before_height * shape_.before_width) * in;
      T* to = wanted ? wanted + n * size : nullptr;
      if (to && halves(which) == 2) std::fill(to, to + size, T(0));
      const int64_t start = (which * shape_.images + n) * g.pixels * shape_.channels;
      for (int64_t p = 0; p < g.pixels; p += kStrip) {
        const int64_t count = std::min(kStrip, g.pixels - p);
        for (int64_t group = 0; group < g.wide.groups; ++group) {
          const int64_t lanes = g.wide.channels_of(group);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t at = start + (p + i) * shape_.channels + group * kLanes;
            dy[group * kStrip + i] = scale[group] * load_channels(gradients + at, lanes) +
                                     scale[g.wide.groups + group] +
                                     scale[2 * g.wide.groups + group] *
                                         load_channels(call.states + at, lanes);
          }
        }
        for (int half = 0; half < halves(which); ++half) {
          if (call.weights_gradient) {
            const auto rows = rectified(image, which, half, p, count, strip);
            product_weight_gradient(rows, dy, g.wide.groups, kStrip, count,
                                    totals + half * g.wide.groups * in);
          }
          if (!to) continue;
          Channels<T> from = plane_channels(dy, kStrip, g.wide.groups);
          from.count = shape_.channels;
          Vec<T>* row = reinterpret_cast<Vec<T>*>(strip);
          product_row(from, transposed_[which] + half * in_groups * shape_.channels, in_groups, row,
                      kStrip, count);
          store_back(image, which, half, p, count, row, to);
        }
      }
    }
  }

  // Masks a strip of the input's gradient by its ReLU and puts it where it belongs.
  void store_back(const T* image, int which, int half, int64_t p, int64_t count, const Vec<T>* row,
                  T* to) const {
    const int64_t in = channels(which);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t pixel = source(which, half, p + i);
      if (pixel < 0) continue;
      for (int64_t c = 0; c < in; c += kLanes) {
        const Vec<T> x = load_channels(image + pixel * in + c, in - c);
        store_channels(relu_gradient(row[c / kLanes * kStrip + i], x), to + pixel * in + c, in - c);
      }
    }
  }

  void unpack(int which, T* gradient) const {
    const int64_t in = channels(which), out = shape_.channels, wide = geometry_.wide.groups;
    std::fill(gradient, gradient + in * out, T(0));
    for (int64_t chunk = 0; chunk < geometry_.chunks.count; ++chunk) {
      for (int half = 0; half < halves(which); ++half) {
        const T* from = reinterpret_cast<const T*>(
            weight_sums_[which] + (chunk * halves(which) + half) * wide * in);
        for (int64_t i = 0; i < in; ++i) {
          for (int64_t o = first_column(which, half); o < last_column(which, half); ++o) {
            gradient[i * out + o] += from[(o / kLanes * in + i) * kLanes + o % kLanes];
          }
        }
      }
    }
  }

  CellShape shape_;
  Geometry<T> geometry_;
  Vec<T>* weights_[2];
  Vec<T>* transposed_[2] = {};
  Vec<T>* weight_sums_[2] = {};  // [chunk][half][group][in]
  Vec<T>* sums_[2] = {};         // [gradient, product][image][group]
  Moments<T>* moments_;          // [which][image][group]
  Vec<T>* coefficients_;         // [which][3][group]
  double* merged_ = nullptr;
  int64_t in_size_, out_size_;
  T* in_;                        // a thread's own
  Vec<T>* out_;
};

}  // namespace nas::NAS_ISA
