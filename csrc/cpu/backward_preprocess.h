// The way back through the preprocessing of a cell's inputs; see preprocess.h.

#pragma once

#include "preprocess.h"

namespace nas::NAS_ISA {

template <typename S, typename T>
class PreprocessBackward : Preprocess<S, T> {
  using Base = Preprocess<S, T>;
  using Base::shape_, Base::geometry_, Base::parts_, Base::count_;

 public:
  PreprocessBackward(const CellShape& shape, int64_t threads, Arena& arena) : Base(shape) {
    for (int i = 0; i < count_; ++i) {
      const Part& part = parts_[i];
      Own& own = own_[i];
      own.transposed = arena.take<Vec<T>>(part.in_groups() * part.out.channels);
      own.weight_sums = arena.take<Vec<T>>(geometry_.chunks.count * part.out.groups * part.in);
      own.coefficients = arena.take<Vec<T>>(3 * part.out.groups);
    }
    sums_ = arena.take<Vec<T>>(2 * 2 * shape.images * geometry_.wide.groups);
    merged_ = arena.take<double>(2 * shape.channels);
    this->take_strips(threads, arena);
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
  void run(const CellBackward<S, T>& call, const S* gradients, const ThreadPool& pool) {
    for (int i = 0; i < count_; ++i) pack(call.weights, parts_[i], own_[i].transposed);
    for (int input = 0; input < 2; ++input) settle_gradient(call, input);
    parallel(pool, 2 * geometry_.chunks.count, [&](int64_t unit, int64_t thread) {
      convolve_back(call, gradients, int(unit % 2), unit / 2, thread);
    });
    if (!call.weights_gradient) return;
    for (int i = 0; i < count_; ++i) unpack(parts_[i], own_[i], call.weights_gradient);
  }

 private:
  struct Own {                     // a part's memory
    Vec<T>* transposed;            // [group of in][channel]
    Vec<T>* weight_sums;           // [chunk][group][in]
    Vec<T>* coefficients;          // [3][group]
  };

  Vec<T>* sums(int input, int product) const {
    return sums_ + (2 * input + product) * shape_.images * geometry_.wide.groups;
  }

  void pack(const T* weights, const Part& part, Vec<T>* transposed) {
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
    this->for_parts(which, own_, [&](const Part& part, const Own& own) {
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
    this->for_parts(which, own_, [&](const Part& part, const Own& own) {
      const int64_t size = part.out.groups * part.in;
      std::fill(own.weight_sums + chunk * size, own.weight_sums + (chunk + 1) * size,
                Vec<T>::zero());
    });
    Vec<T>* dy = this->out_strip(thread);
    T* strip = this->in_strip(thread);
    const S* images = this->input(call.before, call.previous, which, 0);
    if (shape_.partial == 1 && !any_alive(call.live, which)) {
      const S* end = this->input(call.before, call.previous, which, g.last_image(chunk));
      const S* begin = this->input(call.before, call.previous, which, g.first_image(chunk));
      if (wanted && !begun) std::fill(wanted + (begin - images), wanted + (end - images), S{});
      return;
    }
    for (int64_t n = g.first_image(chunk); n < g.last_image(chunk); ++n) {
      const S* image = this->input(call.before, call.previous, which, n);
      S* to = wanted ? wanted + (image - images) : nullptr;
      for (int64_t p = 0; p < g.pixels; p += kStrip) {
        const int64_t count = std::min(kStrip, g.pixels - p);
        const int64_t at = ((which * shape_.images + n) * g.pixels + p) * shape_.channels;
        this->for_parts(which, own_, [&](const Part& part, const Own& own) {
          gradient_of(call, part, own, gradients + at, call.states + at, count, dy);
          if (call.weights_gradient) {
            const auto rows = this->rectified(image, part, p, count, strip);
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
      const auto [y, x] = this->source(part, p + i);
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

  Own own_[3] = {};
  Vec<T>* sums_;                   // [input][gradient, product][image][group]
  double* merged_;
};

}  // namespace nas::NAS_ISA
