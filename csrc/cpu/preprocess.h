// The two convolutions that bring a cell's inputs to its number of channels and its resolution:
// ReLU, pointwise convolution (factorised reduction where the input is twice as large), batch
// normalisation. Backward needs nothing but the normalised states.

#pragma once

#include "edge.h"

namespace nas::NAS_ISA {

constexpr int64_t kStrip = 64;  // pixels that are taken together, so that they stay in cache

// Writes one normalisation's statistics out; `count` numbers a channel made them.
template <typename S, typename T>
void store_statistics(const CellForward<S, T>& call, int64_t at, int64_t channels, int64_t count,
                      const double* mean, const double* variance) {
  for (int64_t c = 0; c < channels; ++c) {
    call.mean[at + c] = T(mean[c]);
    call.reciprocal_deviation[at + c] = T(1 / std::sqrt(variance[c] + kEpsilon));
    call.variance[at + c] = T(variance[c] * (double(count) / double(count - 1)));
  }
}

// One pointwise convolution: of a whole input, or one of the two halves of a factorised reduction.
// A half sees every second pixel from (half, half) on and makes half of the state's channels, in
// Vecs of its own: NaN in one half is none of the other's business.
struct Part {
  int input, half;
  bool halved;
  int64_t in;             // channels that it sees
  int64_t first;          // first channel of the state that it makes
  Layout out;             // of the channels that it makes, one image a block

  int64_t in_groups() const { return (in + kLanes - 1) / kLanes; }
};

template <typename S, typename T>
class Preprocess {
 public:
  Preprocess(const CellShape& shape, int64_t threads, Arena& arena, bool backward)
      : shape_(shape),
        geometry_(shape),
        parts_{make_part(0, 0), make_part(shape.previous_reduction ? 0 : 1, 1), make_part(1, 0)},
        count_(shape.previous_reduction ? 3 : 2) {
    for (int i = 0; i < count_; ++i) {
      const Part& part = parts_[i];
      Own& own = own_[i];
      own.weights = arena.take<Vec<T>>(part.out.groups * part.in);
      if (!backward) {
        own.moments = arena.take<Moments<T>>(shape.images * part.out.groups);
        continue;
      }
      own.transposed = arena.take<Vec<T>>(part.in_groups() * part.out.channels);
      own.weight_sums = arena.take<Vec<T>>(geometry_.chunks.count * part.out.groups * part.in);
      own.coefficients = arena.take<Vec<T>>(3 * part.out.groups);
    }
    const int64_t wide = geometry_.wide.groups;
    sums_ = arena.take<Vec<T>>(backward ? 2 * 2 * shape.images * wide : 0);
    merged_ = arena.take<double>(backward ? 2 * shape.channels : 0);
    const int64_t most = std::max(shape.before_channels, shape.previous_channels);
    in_size_ = kStrip * ((most + kLanes - 1) / kLanes) * kLanes;
    in_ = arena.take<T>(threads * in_size_);
    out_size_ = kStrip * wide;
    out_ = arena.take<Vec<T>>(threads * out_size_);
  }

  // After the states of a chunk's images are made: on_state(input, chunk).
  template <typename OnState>
  void forward(const CellForward<S, T>& call, const ThreadPool& pool, double* merged,
               OnState&& on_state) {
    const auto& g = geometry_;
    for (int i = 0; i < count_; ++i) pack(call.weights, parts_[i], own_[i].weights);
    parallel(pool, 2 * g.chunks.count, [&](int64_t unit, int64_t thread) {
      convolve_images(call, int(unit % 2), unit / 2, thread);
    });
    for (int i = 0; call.training && i < count_; ++i) {
      const Part& part = parts_[i];
      merge_moments(part.out, own_[i].moments, g.pixels, merged, merged + part.out.channels);
      store_statistics(call, shape_.preprocess_statistics(part.input) + part.first,
                       part.out.channels, shape_.images * g.pixels, merged,
                       merged + part.out.channels);
    }
    parallel(pool, 2 * g.chunks.count, [&](int64_t unit, int64_t) {
      normalise(call, int(unit % 2), unit / 2);
      on_state(int(unit % 2), unit / 2);
    });
  }

  // Sums of one image's gradient [H, W, C] of the normalised state `input`, and of its product with
  // the state: what backward needs of each image first.
  void add_up(const CellBackward<S, T>& call, const S* gradients, int input, int64_t image) {
    const auto& g = geometry_;
    const int64_t start = (input * shape_.images + image) * g.pixels * shape_.channels;
    for (int64_t group = 0; group < g.wide.groups; ++group) {
      const int64_t count = g.wide.channels_of(group);
      Vec<T> sum = Vec<T>::zero(), product = Vec<T>::zero();
      for (int64_t p = 0; p < g.pixels; ++p) {
        const int64_t at = start + p * shape_.channels + group * kLanes;
        const Vec<T> gradient = load_channels(gradients + at, count);
        sum += gradient;
        product += gradient * load_channels(call.states + at, count);
      }
      sums(input, 0)[image * g.wide.groups + group] = sum;
      sums(input, 1)[image * g.wide.groups + group] = product;
    }
  }

  // `gradients` [2, N, H, W, C], of the normalised states. A state that no active operation reads
  // has none, which is not the same as zeros: their product with NaN is NaN.
  void backward(const CellBackward<S, T>& call, const S* gradients, const ThreadPool& pool) {
    for (int i = 0; i < count_; ++i) pack_back(call.weights, parts_[i], own_[i].transposed);
    for (int input = 0; input < 2; ++input) settle_gradient(call, input);
    parallel(pool, 2 * geometry_.chunks.count, [&](int64_t unit, int64_t thread) {
      convolve_back(call, gradients, int(unit % 2), unit / 2, thread);
    });
    if (!call.weights_gradient) return;
    for (int i = 0; i < count_; ++i) unpack(parts_[i], own_[i], call.weights_gradient);
  }

 private:
  struct Own {                     // a part's memory
    Vec<T>* weights;               // [group][in]
    Vec<T>* transposed;            // [group of in][channel]
    Vec<T>* weight_sums;           // [chunk][group][in]
    Moments<T>* moments;           // [image][group]
    Vec<T>* coefficients;          // [3][group]
  };

  Part make_part(int input, int half) const {
    if (input == 1) return {1, 0, false, shape_.previous_channels, 0, geometry_.wide};
    const int64_t in = shape_.before_channels, even = shape_.channels / 2;
    if (!shape_.previous_reduction) return {0, 0, false, in, 0, geometry_.wide};
    const int64_t out = half ? shape_.channels - even : even;
    return {0, half, true, in, half ? even : 0, whole_images(shape_.images, out)};
  }
  // Calls f with each part of an input and its memory.
  template <typename F>
  void for_parts(int input, F&& f) {
    for (int i = 0; i < count_; ++i) {
      if (parts_[i].input == input) f(parts_[i], own_[i]);
    }
  }
  Vec<T>* sums(int input, int product) const {
    return sums_ + (2 * input + product) * shape_.images * geometry_.wide.groups;
  }

  void pack(const T* weights, const Part& part, Vec<T>* to) {
    const T* from = weights + shape_.preprocess(part.input) + part.first;
    for (int64_t group = 0; group < part.out.groups; ++group) {
      for (int64_t i = 0; i < part.in; ++i) {
        to[group * part.in + i] = load_channels(from + i * shape_.channels + group * kLanes,
                                                part.out.channels_of(group));
      }
    }
  }
  void pack_back(const T* weights, const Part& part, Vec<T>* transposed) {
    const T* from = weights + shape_.preprocess(part.input) + part.first;
    T* to = reinterpret_cast<T*>(transposed);
    std::fill(to, to + part.in_groups() * part.out.channels * kLanes, T(0));
    for (int64_t i = 0; i < part.in; ++i) {
      T* lane = to + i / kLanes * part.out.channels * kLanes + i % kLanes;
      for (int64_t o = 0; o < part.out.channels; ++o) {
        lane[o * kLanes] = from[i * shape_.channels + o];
      }
    }
  }

  const S* input(const S* before, const S* previous, int which, int64_t image) const {
    if (which) return previous + image * geometry_.pixels * shape_.previous_channels;
    return before + image * shape_.before_height * shape_.before_width * shape_.before_channels;
  }

  // Row and column that a half's state pixel `p` looks at; they may lie beyond the input's edge.
  std::pair<int64_t, int64_t> source(const Part& part, int64_t p) const {
    return {2 * (p / geometry_.width) + part.half, 2 * (p % geometry_.width) + part.half};
  }

  // relu of the input pixels behind a strip of state pixels, [pixel][channel]; zeros beyond the edge.
  Channels<T> rectified(const S* image, const Part& part, int64_t p, int64_t count, T* to) const {
    const auto copy = [](const S* from, int64_t numbers, T* into) {
      int64_t i = 0;
      for (; i + kLanes <= numbers; i += kLanes) {
        relu(load_channels(from + i, kLanes)).store(into + i);
      }
      for (; i < numbers; ++i) {
        const T value = widen(from[i]);
        into[i] = value < 0 ? T(0) : value;
      }
    };
    if (!part.halved) {
      copy(image + p * part.in, count * part.in, to);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const auto [y, x] = source(part, p + i);
        if (y < shape_.before_height && x < shape_.before_width) {
          copy(image + (y * shape_.before_width + x) * part.in, part.in, to + i * part.in);
        } else {
          std::fill(to + i * part.in, to + (i + 1) * part.in, T(0));
        }
      }
    }
    return {to, part.in, kLanes, part.in};
  }

  void convolve_images(const CellForward<S, T>& call, int which, int64_t chunk, int64_t thread) {
    const auto& g = geometry_;
    const int64_t channels = shape_.channels;
    for (int64_t n = g.first_image(chunk); n < g.last_image(chunk); ++n) {
      const S* image = input(call.before, call.previous, which, n);
      S* state = call.states + (which * shape_.images + n) * g.pixels * channels;
      for (int64_t p = 0; p < g.pixels; p += kStrip) {
        const int64_t count = std::min(kStrip, g.pixels - p);
        for_parts(which, [&](const Part& part, const Own& own) {
          const auto in = rectified(image, part, p, count, in_ + thread * in_size_);
          S* to = state + p * channels + part.first;
          multiply(part, own, in, count, to, out_ + thread * out_size_);
          for (int64_t group = 0; group < part.out.groups; ++group) {
            const S* from = to + group * kLanes;
            const int64_t lanes = part.out.channels_of(group);
            own.moments[n * part.out.groups + group].add(
                count, p == 0, [=](int64_t x) NAS_INLINED {
                  return load_channels(from + x * channels, lanes);
                });
          }
        });
      }
    }
  }

  // A part's product for a strip of pixels, to their channels in memory.
  void multiply(const Part& part, const Own& own, const Channels<T>& in, int64_t count, S* to,
                Vec<T>* spare) const {
    const int64_t channels = shape_.channels, groups = part.out.groups;
    if constexpr (!kRounded<S, T>) {
      if (channels % kLanes == 0 && part.out.channels % kLanes == 0) {
        return product_row(in, own.weights, groups,
                           {reinterpret_cast<Vec<T>*>(to), 1, channels / kLanes}, count);
      }
    }
    product_row(in, own.weights, groups, {spare, 1, groups}, count);
    for (int64_t x = 0; x < count; ++x) {
      for (int64_t group = 0; group < groups; ++group) {
        store_channels(spare[x * groups + group], to + x * channels + group * kLanes,
                       part.out.channels_of(group));
      }
    }
  }

  void normalise(const CellForward<S, T>& call, int which, int64_t chunk) {
    const auto& g = geometry_;
    const int64_t at = shape_.preprocess_statistics(which);
    for (int64_t n = g.first_image(chunk); n < g.last_image(chunk); ++n) {
      S* state = call.states + (which * shape_.images + n) * g.pixels * shape_.channels;
      for (int64_t group = 0; group < g.wide.groups; ++group) {
        const int64_t count = g.wide.channels_of(group);
        const Vec<T> mean = in_lanes<T>(g.wide, call.mean + at, group);
        const Vec<T> scale = in_lanes<T>(g.wide, call.reciprocal_deviation + at, group);
        for (int64_t p = 0; p < g.pixels; ++p) {
          S* to = state + p * shape_.channels + group * kLanes;
          store_channels((load_channels(to, count) - mean) * scale, to, count);
        }
      }
    }
  }

  // Coefficients of: convolution's gradient = a * gradient + b + d * state. In evaluation, b and d
  // are no part of it.
  void settle_gradient(const CellBackward<S, T>& call, int which) {
    const auto& g = geometry_;
    const T* scale = call.reciprocal_deviation + shape_.preprocess_statistics(which);
    double *sum = merged_, *product = merged_ + shape_.channels;
    if (call.training) {
      const double each = 1.0 / double(shape_.images * g.pixels);
      merge_sums(g.wide, sums(which, 0), sum);
      merge_sums(g.wide, sums(which, 1), product);
      for (int64_t c = 0; c < shape_.channels; ++c) {
        sum[c] *= -double(scale[c]) * each;
        product[c] *= -double(scale[c]) * each;
      }
    }
    for_parts(which, [&](const Part& part, const Own& own) {
      const int64_t groups = part.out.groups;
      for (int64_t group = 0; group < groups; ++group) {
        Vec<T>* to = own.coefficients + group;
        to[0] = in_lanes<T>(part.out, scale + part.first, group);
        if (!call.training) continue;
        to[groups] = in_lanes<T>(part.out, sum + part.first, group);
        to[2 * groups] = in_lanes<T>(part.out, product + part.first, group);
      }
    });
  }

  void convolve_back(const CellBackward<S, T>& call, const S* gradients, int which, int64_t chunk,
                     int64_t thread) {
    const auto& g = geometry_;
    S* wanted = which ? call.previous_gradient : call.before_gradient;
    const bool begun = which && call.previous_begun;
    if (!wanted && !call.weights_gradient) return;
    for_parts(which, [&](const Part& part, const Own& own) {
      const int64_t size = part.out.groups * part.in;
      std::fill(own.weight_sums + chunk * size, own.weight_sums + (chunk + 1) * size,
                Vec<T>::zero());
    });
    Vec<T>* dy = out_ + thread * out_size_;
    T* strip = in_ + thread * in_size_;
    const S* images = input(call.before, call.previous, which, 0);
    if (shape_.partial == 1 && !any_alive(call.live, which)) {
      const S* end = input(call.before, call.previous, which, g.last_image(chunk));
      const S* begin = input(call.before, call.previous, which, g.first_image(chunk));
      if (wanted && !begun) std::fill(wanted + (begin - images), wanted + (end - images), S{});
      return;
    }
    for (int64_t n = g.first_image(chunk); n < g.last_image(chunk); ++n) {
      const S* image = input(call.before, call.previous, which, n);
      S* to = wanted ? wanted + (image - images) : nullptr;
      for (int64_t p = 0; p < g.pixels; p += kStrip) {
        const int64_t count = std::min(kStrip, g.pixels - p);
        const int64_t at = ((which * shape_.images + n) * g.pixels + p) * shape_.channels;
        for_parts(which, [&](const Part& part, const Own& own) {
          gradient_of(call, part, own, gradients + at, call.states + at, count, dy);
          if (call.weights_gradient) {
            const auto rows = rectified(image, part, p, count, strip);
            product_weight_gradient(rows, {dy, 1, part.out.groups}, part.out.groups, count,
                                    own.weight_sums + chunk * part.out.groups * part.in);
          }
          if (!to) return;
          const Channels<T> from{reinterpret_cast<const T*>(dy), part.out.groups * kLanes, kLanes,
                                 part.out.channels};
          Vec<T>* row = reinterpret_cast<Vec<T>*>(strip);
          product_row(from, own.transposed, part.in_groups(), {row, 1, part.in_groups()}, count);
          store_back(image, part, p, count, row, to, begun);
        });
      }
    }
  }

  // The gradient of a part's convolution for a strip of pixels, from those of the normalised state:
  // [pixel][group].
  void gradient_of(const CellBackward<S, T>& call, const Part& part, const Own& own,
                   const S* gradients, const S* states, int64_t count, Vec<T>* to) const {
    constexpr int kTogether = 4;
    const int64_t groups = part.out.groups;
    for (int64_t first = 0; first < groups; first += kTogether) {
      with_most<kTogether>(int(groups - first), [&](auto some) NAS_INLINED {
        Vec<T> a[some], b[some], d[some];
        NAS_UNROLL for (int k = 0; k < some; ++k) {
          const Vec<T>* coefficients = own.coefficients + first + k;
          a[k] = coefficients[0];
          b[k] = coefficients[groups];
          d[k] = coefficients[2 * groups];
        }
        for (int64_t i = 0; i < count; ++i) {
          NAS_UNROLL for (int k = 0; k < some; ++k) {
            const int64_t lanes = part.out.channels_of(first + k);
            const int64_t at = i * shape_.channels + part.first + (first + k) * kLanes;
            Vec<T> dy = a[k] * load_channels(gradients + at, lanes);
            if (call.training) dy += b[k] + d[k] * load_channels(states + at, lanes);
            to[i * groups + first + k] = dy;
          }
        }
      });
    }
  }

  // Masks a strip of the input's gradient by its ReLU and puts it where it belongs, or adds it to
  // what is there. The strip is [pixel][group].
  void store_back(const S* image, const Part& part, int64_t p, int64_t count, const Vec<T>* row,
                  S* to, bool begun) const {
    const auto store_channels_of = [&](int64_t at, const Vec<T>& value, int64_t lanes) NAS_INLINED {
      Vec<T> gradient = relu_gradient(value, load_channels(image + at, lanes));
      if (begun) gradient += load_channels(to + at, lanes);
      store_channels(gradient, to + at, lanes);
    };
    if (!part.halved && part.in % kLanes == 0) {
      const int64_t first = p * part.in;
      for (int64_t i = 0; i < count * part.in_groups(); ++i) {
        store_channels_of(first + i * kLanes, row[i], kLanes);
      }
      return;
    }
    const auto store = [&](int64_t pixel, int64_t i) {
      for (int64_t c = 0; c < part.in; c += kLanes) {
        store_channels_of(pixel * part.in + c, row[i * part.in_groups() + c / kLanes], part.in - c);
      }
    };
    if (!part.halved) {
      for (int64_t i = 0; i < count; ++i) store(p + i, i);
      return;
    }
    // Each half fills every second row: the pixels between those that it sees get zeros.
    for (int64_t i = 0; i < count; ++i) {
      const auto [y, x] = source(part, p + i);
      if (y >= shape_.before_height) continue;
      const int64_t other = x + 1 - 2 * part.half, row_start = y * shape_.before_width;
      if (x < shape_.before_width) store(row_start + x, i);
      if (other < shape_.before_width) {
        S* zeros = to + (row_start + other) * part.in;
        std::fill(zeros, zeros + part.in, S{});
      }
    }
  }

  void unpack(const Part& part, const Own& own, T* gradient) const {
    gradient += shape_.preprocess(part.input) + part.first;
    for (int64_t group = 0; group < part.out.groups; ++group) {
      for (int64_t i = 0; i < part.in; ++i) {
        Vec<T> total = Vec<T>::zero();
        for (int64_t chunk = 0; chunk < geometry_.chunks.count; ++chunk) {
          total += own.weight_sums[(chunk * part.out.groups + group) * part.in + i];
        }
        store_channels(total, gradient + i * shape_.channels + group * kLanes,
                       part.out.channels_of(group));
      }
    }
  }

  CellShape shape_;
  Geometry<T> geometry_;
  Part parts_[3];                  // of the first input one or two, then the second's
  Own own_[3] = {};
  int count_;
  Vec<T>* sums_;                   // [input][gradient, product][image][group]
  double* merged_;
  int64_t in_size_, out_size_;
  T* in_;                          // a thread's own
  Vec<T>* out_;
};

}  // namespace nas::NAS_ISA
