// The preprocessing of a cell's inputs, forward; see preprocess.h.

#pragma once

#include "preprocess.h"

namespace nas::NAS_ISA {

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

template <typename S, typename T>
class PreprocessForward : Preprocess<S, T> {
  using Base = Preprocess<S, T>;
  using Base::shape_, Base::geometry_, Base::parts_, Base::count_;

 public:
  PreprocessForward(const CellShape& shape, int64_t threads, Arena& arena) : Base(shape) {
    for (int i = 0; i < count_; ++i) {
      const Part& part = parts_[i];
      own_[i].weights = arena.take<Vec<T>>(part.out.groups * part.in);
      own_[i].moments = arena.take<Moments<T>>(shape.images * part.out.groups);
    }
    this->take_strips(threads, arena);
  }

  // After the states of a chunk's images are made: on_state(input, chunk).
  template <typename OnState>
  void run(const CellForward<S, T>& call, const ThreadPool& pool, double* merged,
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

 private:
  struct Own {                     // a part's memory
    Vec<T>* weights;               // [group][in]
    Moments<T>* moments;           // [image][group]
  };

  void pack(const T* weights, const Part& part, Vec<T>* to) {
    const T* from = weights + shape_.preprocess(part.input) + part.first;
    for (int64_t group = 0; group < part.out.groups; ++group) {
      for (int64_t i = 0; i < part.in; ++i) {
        to[group * part.in + i] = load_channels(from + i * shape_.channels + group * kLanes,
                                                part.out.channels_of(group));
      }
    }
  }

  void convolve_images(const CellForward<S, T>& call, int which, int64_t chunk, int64_t thread) {
    const auto& g = geometry_;
    const int64_t channels = shape_.channels;
    for (int64_t n = g.first_image(chunk); n < g.last_image(chunk); ++n) {
      const S* image = this->input(call.before, call.previous, which, n);
      S* state = call.states + (which * shape_.images + n) * g.pixels * channels;
      for (int64_t p = 0; p < g.pixels; p += kStrip) {
        const int64_t count = std::min(kStrip, g.pixels - p);
        this->for_parts(which, own_, [&](const Part& part, const Own& own) {
          const auto in = this->rectified(image, part, p, count, this->in_strip(thread));
          S* to = state + p * channels + part.first;
          multiply(part, own, in, count, to, this->out_strip(thread));
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

  Own own_[3] = {};
};

}  // namespace nas::NAS_ISA
