// The two convolutions that bring a cell's inputs to its number of channels and its resolution:
// ReLU, pointwise convolution (factorised reduction where the input is twice as large), batch
// normalisation. Backward needs nothing but the normalised states. Here is what both directions share.

#pragma once

#include "edge.h"

namespace nas::NAS_ISA {

constexpr int64_t kStrip = 64;  // pixels that are taken together, so that they stay in cache

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
 protected:
  explicit Preprocess(const CellShape& shape)
      : shape_(shape),
        geometry_(shape),
        parts_{make_part(0, 0), make_part(shape.previous_reduction ? 0 : 1, 1), make_part(1, 0)},
        count_(shape.previous_reduction ? 3 : 2) {}

  // Room for strips of input pixels and of state pixels, for each thread.
  void take_strips(int64_t threads, Arena& arena) {
    const int64_t most = std::max(shape_.before_channels, shape_.previous_channels);
    in_size_ = kStrip * ((most + kLanes - 1) / kLanes) * kLanes;
    in_ = arena.take<T>(threads * in_size_);
    out_size_ = kStrip * geometry_.wide.groups;
    out_ = arena.take<Vec<T>>(threads * out_size_);
  }
  T* in_strip(int64_t thread) const { return in_ + thread * in_size_; }
  Vec<T>* out_strip(int64_t thread) const { return out_ + thread * out_size_; }

  // Calls f with each part of an input and what `own`, of all parts, has for it.
  template <typename Own, typename F>
  void for_parts(int input, Own* own, F&& f) const {
    for (int i = 0; i < count_; ++i) {
      if (parts_[i].input == input) f(parts_[i], own[i]);
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

  CellShape shape_;
  Geometry<T> geometry_;
  Part parts_[3];                  // of the first input one or two, then the second's
  int count_;

 private:
  Part make_part(int input, int half) const {
    if (input == 1) return {1, 0, false, shape_.previous_channels, 0, geometry_.wide};
    const int64_t in = shape_.before_channels, even = shape_.channels / 2;
    if (!shape_.previous_reduction) return {0, 0, false, in, 0, geometry_.wide};
    const int64_t out = half ? shape_.channels - even : even;
    return {0, half, true, in, half ? even : 0, whole_images(shape_.images, out)};
  }

  int64_t in_size_ = 0, out_size_ = 0;
  T* in_ = nullptr;                // a thread's own
  Vec<T>* out_ = nullptr;
};

}  // namespace nas::NAS_ISA
