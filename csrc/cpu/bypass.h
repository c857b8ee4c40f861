// The channels of PC-DARTS that pass an edge by.

#pragma once

#include "edge.h"
#include "shuffle.h"

namespace nas::NAS_ISA {

// All channels of state `s`, pixel by pixel of a node. `pooled` [2, N, h, w, C] is what passes from
// the inputs of a reduction cell.
template <typename S, typename T>
Images<const S> passing(const Geometry<T>& g, int s, const S* states, const S* output,
                        const S* pooled) {
  const int64_t channels = g.shape.channels, pixels = g.node_pixels;
  if (s >= 2) return {output + (s - 2) * channels, pixels * kNodes * channels, kNodes * channels};
  const S* from = g.stride(s) == 2 ? pooled : states;
  return {from + s * g.shape.images * pixels * channels, pixels * channels, channels};
}

// The channels that pass edges by, of a row of pixels: the Vecs from channel `start` on. The first
// of them may begin with mixed channels, where `mask` is zero.
template <typename T>
struct PassedRow {
  int64_t start, channels, width;
  Vec<T> mask;

  PassedRow(const Geometry<T>& g, int64_t width)
      : start(g.lanes.channels / kLanes * kLanes), channels(g.shape.channels), width(width) {
    alignas(64) T lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = T(start + i >= g.lanes.channels);
    mask = Vec<T>::load(lanes);
  }
  NAS_INLINE Vec<T> unmixed(const Vec<T>& x, int64_t at) const {
    return at == start ? select(mask, x) : x;
  }

  // to[x][c] = sum over edges of weights[edge] * from[edge][x][c]; mixed channels become anything.
  template <int Edges, typename S>
  void add_up(const Images<const S>* from, const T* weights, S* to) const {
    Vec<T> weight[Edges];
    NAS_UNROLL for (int edge = 0; edge < Edges; ++edge) weight[edge] = Vec<T>::splat(weights[edge]);
    for (int64_t x = 0; x < width; ++x) {
      for (int64_t at = start; at < channels; at += kLanes) {
        Vec<T> sum = Vec<T>::zero();
        NAS_UNROLL for (int edge = 0; edge < Edges; ++edge) {
          const S* value = from[edge].at + x * from[edge].pixel + at;
          prefetch(value + kAhead * from[edge].pixel);
          sum += weight[edge] * load_channels(value, channels - at);
        }
        store_channels(sum, to + x * channels + at, channels - at);
      }
    }
  }

  // The way back to the state that edges leave: to[x][c] = own[x][c] + sum over edges of
  // weights[edge] * gradient[edge][x][c] and, to weigh the edges, products[edge] +=
  // gradient[edge][x][c] * state[x][c]. `own`, which may be null, has all channels; of the gradients [x][C] the mixed ones are zero.
  template <int Edges, bool Weigh, typename S, typename U>
  void send_back(const S* const* gradients, const T* weights, Images<const S> state,
                 Images<const S> own, Vec<T>* products, U* to) const {
    Vec<T> weight[Edges], product[Edges];
    NAS_UNROLL for (int edge = 0; edge < Edges; ++edge) {
      weight[edge] = Vec<T>::splat(weights[edge]);
      product[edge] = products[edge];
    }
    for (int64_t x = 0; x < width; ++x) {
      for (int64_t at = 0; own.at && at < start; at += kLanes) {
        const Vec<T> value = load_channels(own.at + x * own.pixel + at, kLanes);
        store_channels(value, to + x * channels + at, kLanes);
      }
      for (int64_t at = start; at < channels; at += kLanes) {
        const int64_t count = channels - at;
        Vec<T> value;
        if constexpr (Weigh) {
          prefetch(state.at + (x + kAhead) * state.pixel + at);
          value = unmixed(load_channels(state.at + x * state.pixel + at, count), at);
        }
        Vec<T> sum = Vec<T>::zero();
        NAS_UNROLL for (int edge = 0; edge < Edges; ++edge) {
          prefetch(gradients[edge] + (x + kAhead) * channels + at);
          const Vec<T> gradient = load_channels(gradients[edge] + x * channels + at, count);
          if constexpr (Weigh) product[edge] += gradient * value;
          sum += gradient * weight[edge];
        }
        sum = unmixed(sum, at);
        if (own.at) {
          prefetch(own.at + (x + kAhead) * own.pixel + at);
          sum += load_channels(own.at + x * own.pixel + at, count);
        }
        store_channels(sum, to + x * channels + at, count);
      }
    }
    NAS_UNROLL for (int edge = 0; edge < Edges; ++edge) products[edge] = product[edge];
  }
};

// Calls f with the Vecs of a pixel, a constant, where Quarters knows its shuffle; says whether it does.
template <typename T, typename F>
bool with_quarters(const Geometry<T>& g, F&& f) {
  if (g.shape.partial != 4) return false;
  if (g.shape.channels == 16) return f(std::integral_constant<int, 1>{}), true;
  if (g.shape.channels == 32) return f(std::integral_constant<int, 2>{}), true;
  if (g.shape.channels == 64) return f(std::integral_constant<int, 4>{}), true;
  return false;
}

// The pixels under a node's pixel (y, x) that stride 2 makes one: numbers from their image on.
struct Square {
  int64_t pixel[4];
  int count = 0;

  template <typename T>
  NAS_INLINE Square(const Geometry<T>& g, int64_t y, int64_t x) {
    for (int64_t r = 2 * y; r < std::min(2 * y + 2, g.height); ++r) {
      for (int64_t c = 2 * x; c < std::min(2 * x + 2, g.width); ++c) {
        pixel[count++] = (r * g.width + c) * g.shape.channels;
      }
    }
  }
};

template <typename S>
NAS_INLINE auto highest(const S* image, const Square& square, int64_t at, int64_t count) {
  auto high = load_channels(image + square.pixel[0] + at, count);
  for (int i = 1; i < square.count; ++i) {
    high = maximum<true>(high, load_channels(image + square.pixel[i] + at, count));
  }
  return high;
}

// What passes from one image of a state under stride 2: the maxima of 2x2 pixels, [h, w, C].
template <typename S, typename T>
void pool_passing(const Geometry<T>& g, int64_t start, const S* image, S* to) {
  const int64_t channels = g.shape.channels;
  for (int64_t y = 0; y < g.node_height; ++y) {
    for (int64_t x = 0; x < g.node_width; ++x, to += channels) {
      const Square square(g, y, x);
      for (int64_t at = start; at < channels; at += kLanes) {
        const int64_t count = channels - at;
        store_channels(highest(image, square, at, count), to + at, count);
      }
    }
  }
}

// Sends a row of gradients [x][C] of those maxima to the pixels that they came from. Without `Nan`,
// says whether all maxima were finite: only then is it right.
template <bool Nan, typename S, typename T>
bool unpool_row(const Geometry<T>& g, int64_t start, const S* image, int64_t y, const T* gradient,
                S* to) {
  const int64_t channels = g.shape.channels;
  Vec<T> none = Vec<T>::zero();
  for (int64_t x = 0; x < g.node_width; ++x) {
    const Square square(g, y, x);
    for (int64_t at = start; at < channels; at += kLanes) {
      const int64_t count = channels - at;
      Vec<T> value[4], share[4];
      for (int i = 0; i < square.count; ++i) {
        value[i] = load_channels(image + square.pixel[i] + at, count);
      }
      Vec<T> high = value[0];
      for (int i = 1; i < square.count; ++i) high = maximum<true>(high, value[i]);
      Vec<T> left = load_channels(gradient + x * channels + at, count);
      if constexpr (Nan) {
        Vec<T> of_nan = claim_nan(left, high);
        for (int i = square.count - 1; i >= 0; --i) share[i] = claim<true>(of_nan, value[i], high);
      } else {
        none += high - high;
      }
      for (int i = 0; i < square.count; ++i) {
        const Vec<T> taken = claim<Nan>(left, value[i], high);
        store_channels(Nan ? share[i] + taken : taken, to + square.pixel[i] + at, count);
      }
    }
  }
  return sum(none, 0, kLanes) == 0;
}
template <typename S, typename T>
void unpool_row(const Geometry<T>& g, int64_t start, const S* image, int64_t y, const T* gradient,
                S* to) {
  if (unpool_row<false>(g, start, image, y, gradient, to)) return;
  unpool_row<true>(g, start, image, y, gradient, to);
}

}  // namespace nas::NAS_ISA
