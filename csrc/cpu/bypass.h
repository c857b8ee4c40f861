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

// PC-DARTS, section 3.2: channel k * mixed + j moves to j * partial + k.
template <typename T>
NAS_INLINE void transpose_channels(const T* from, int64_t rows, int64_t columns, T* to) {
  int64_t r = 0;
  if (columns == 4) {  // in squares that stay in registers
    for (; r + 4 <= rows; r += 4) {
      T square[16];
      std::memcpy(square, from + r * 4, sizeof(square));
      NAS_UNROLL for (int c = 0; c < 4; ++c) {
        NAS_UNROLL for (int i = 0; i < 4; ++i) to[c * rows + r + i] = square[i * 4 + c];
      }
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
  }
}
template <typename T>
NAS_INLINE void shuffle(const T* from, int64_t mixed, int64_t partial, T* to) {
  if (partial == 4 && mixed % 4 == 0) {
    for (int64_t j = 0; j < mixed; j += 4) {
      NAS_UNROLL for (int i = 0; i < 4; ++i) {
        NAS_UNROLL for (int k = 0; k < 4; ++k) to[(j + i) * 4 + k] = from[k * mixed + j + i];
      }
    }
    return;
  }
  transpose_channels(from, partial, mixed, to);
}
template <typename T>
NAS_INLINE void unshuffle(const T* from, int64_t mixed, int64_t partial, T* to) {
  transpose_channels(from, mixed, partial, to);
}

}  // namespace nas::NAS_ISA
