// The channels of PC-DARTS that pass an edge by.

#pragma once

#include "edge.h"

namespace nas::NAS_ISA {

// All channels of state `s` of one image, at its pixel (y, x).
template <typename U, typename T>
NAS_INLINE U* state_pixel(U* states, U* output, const Geometry<T>& g, int s, int64_t image,
                          int64_t y, int64_t x) {
  const int64_t channels = g.shape.channels;
  const int64_t pixel = (image * g.state_height(s) + y) * g.state_width(s) + x;
  if (s < 2) return states + (s * g.shape.images * g.pixels + pixel) * channels;
  return output + (pixel * kNodes + s - 2) * channels;
}

// Channels at..at + 15 of what reaches the node pixel (y, x) from state `s`: itself, or under
// stride 2 the maximum of 2x2 pixels.
template <typename T>
NAS_INLINE Vec<T> bypassing(const T* states, const T* output, const Geometry<T>& g, int s,
                            int64_t image, int64_t y, int64_t x, int64_t at) {
  const int64_t count = g.shape.channels - at;
  if (g.stride(s) == 1) {
    return load_channels(state_pixel(states, output, g, s, image, y, x) + at, count);
  }
  Vec<T> high = load_channels(state_pixel(states, output, g, s, image, 2 * y, 2 * x) + at, count);
  for (int64_t r = 2 * y; r < std::min(2 * y + 2, g.height); ++r) {
    for (int64_t c = 2 * x; c < std::min(2 * x + 2, g.width); ++c) {
      if (r == 2 * y && c == 2 * x) continue;
      high = maximum(high,
                     load_channels(state_pixel(states, output, g, s, image, r, c) + at, count));
    }
  }
  return high;
}

// Sends `gradient` for those channels back to the pixels of state `s` that made them. Under stride 1
// there is one, and nothing was there before.
template <typename T>
NAS_INLINE void bypass_gradient(const T* states, const T* output, const Geometry<T>& g, int s,
                                int64_t image, int64_t y, int64_t x, int64_t at, Vec<T> gradient,
                                T* to) {
  const int64_t channels = g.shape.channels, count = channels - at;
  const auto pixel = [&](int64_t r, int64_t c) {
    return to + ((image * g.state_height(s) + r) * g.state_width(s) + c) * channels + at;
  };
  if (g.stride(s) == 1) return store_channels(gradient, pixel(y, x), count);
  const Vec<T> high = bypassing(states, output, g, s, image, y, x, at);
  for (int64_t r = 2 * y; r < std::min(2 * y + 2, g.height); ++r) {
    for (int64_t c = 2 * x; c < std::min(2 * x + 2, g.width); ++c) {
      const Vec<T> value =
          load_channels(state_pixel(states, output, g, s, image, r, c) + at, count);
      store_channels(claim(gradient, value, high), pixel(r, c), count);
    }
  }
}

// The channels of image `n` of a block, from the lanes of one pixel to where they lie together.
template <typename T>
NAS_INLINE void copy_lanes(const Layout& layout, const T* lanes, int64_t group, int64_t n, T* to) {
  if (layout.group < kLanes) {
    with_count(layout.channels, [&](auto count) {
      std::memcpy(to, lanes + n * layout.group, count * sizeof(T));
    });
    return;
  }
  for (int64_t c = 0; c < layout.channels; c += kLanes) {
    copy_channels(lanes + c / kLanes * group, std::min<int64_t>(kLanes, layout.channels - c),
                  to + c);
  }
}

// Four rows of four numbers, turned into columns.
template <typename T>
NAS_INLINE void transpose_square(const T* const (&from)[4], T* const (&to)[4]) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
  Four row[4];
  NAS_UNROLL for (int i = 0; i < 4; ++i) row[i] = *reinterpret_cast<const Four*>(from[i]);
  const Four a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Four b = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Four c = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Four d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  *reinterpret_cast<Four*>(to[0]) = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to[1]) = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  *reinterpret_cast<Four*>(to[2]) = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to[3]) = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// PC-DARTS, section 3.2: channel k * mixed + j moves to j * partial + k.
template <typename T>
NAS_INLINE void shuffle(const T* from, int64_t mixed, int64_t partial, T* to) {
  if (partial == 4 && mixed % 4 == 0) {
    for (int64_t j = 0; j < mixed; j += 4) {
      const T* row = from + j;
      T* out = to + 4 * j;
      transpose_square<T>({row, row + mixed, row + 2 * mixed, row + 3 * mixed},
                          {out, out + 4, out + 8, out + 12});
    }
    return;
  }
  for (int64_t j = 0; j < mixed; ++j) {
    for (int64_t k = 0; k < partial; ++k) to[j * partial + k] = from[k * mixed + j];
  }
}

// The way back; the first `mixed` channels go to `lanes` [group] of Vec, `plane` apart, and are zero
// among the others.
template <typename T>
NAS_INLINE void unshuffle(const T* from, int64_t mixed, int64_t partial, T* lanes, int64_t plane,
                          T* to) {
  const auto lane = [&](int64_t j) { return lanes + j / kLanes * plane + j % kLanes; };
  for (int64_t j = 0; j < mixed; ++j) to[j] = 0;
  if (partial == 4 && mixed % 4 == 0) {
    for (int64_t j = 0; j < mixed; j += 4) {
      const T* row = from + 4 * j;
      T* out = to + j;
      transpose_square<T>({row, row + 4, row + 8, row + 12},
                          {lane(j), out + mixed, out + 2 * mixed, out + 3 * mixed});
    }
    return;
  }
  for (int64_t j = 0; j < mixed; ++j) {
    *lane(j) = from[j * partial];
    for (int64_t k = 1; k < partial; ++k) to[k * mixed + j] = from[j * partial + k];
  }
}

}  // namespace nas::NAS_ISA
