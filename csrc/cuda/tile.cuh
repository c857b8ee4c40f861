// Tiles in shared memory: planning them, loading them, and depthwise convolutions of them.

#pragma once

#include <stdexcept>
#include <string>

#include "geometry.h"

namespace nas::cuda {

constexpr int kSide = 4;      // a thread takes 4 x 4 outputs of a depthwise convolution or a product
constexpr int kNumbers = 4096;  // of a tile, pixels times channels: 16 for each thread

// Division by a number that is known at launch: exact below 2^16.
struct Divider {
  unsigned by, factor;

  NAS_DEVICE explicit Divider(int divisor)
      : by(unsigned(divisor)), factor(unsigned(0xffffffffu / unsigned(divisor) + 1)) {}
  NAS_DEVICE int operator()(int x) const {
    return by == 1 ? x : int((uint64_t(unsigned(x)) * factor) >> 32);
  }
};

// What a tile reads: rows and pitch count pixels, border included. A pixel takes `cell` numbers,
// which spreads the pixels that a warp reads over the banks.
struct Region {
  int rows, columns, pitch, cell;
  int border = 0;  // pixels above and left of the tile

  // `rows` x `columns` outputs, of which a thread takes four, `spacing` apart, in each direction.
  NAS_BOTH static Region of(int rows, int columns, int slab, int stride, int spacing, int reach) {
    const auto side = [&](int n) { return (round_up(n, kSide * spacing) - 1) * stride + reach + 1; };
    const int wide = side(columns);
    return {side(rows), wide, wide | 1, slab < 32 && slab % 4 == 0 ? slab + slab / 4 : slab};
  }
  NAS_BOTH int64_t numbers(int images) const { return int64_t(images) * rows * pitch * cell; }
  // Where that begins which an operation with less of a border reads.
  NAS_BOTH int inner(int padding) const { return (border - padding) * (pitch + 1) * cell; }
  // Holds the other one, too, around the same tile.
  NAS_BOTH void include(const Region& other) {
    const int after = larger(rows - border, other.rows - other.border);
    const int right = larger(columns - border, other.columns - other.border);
    border = larger(border, other.border);
    rows = border + after;
    columns = border + right;
    pitch = columns | 1;
  }
};

// How a depthwise convolution steps over its input, given the geometry of a launch.
struct Steps {
  int size, dilation, stride;

  NAS_BOTH int spacing() const { return stride == 1 ? dilation : 1; }
  NAS_BOTH int reach() const { return (size - 1) * dilation; }
  NAS_BOTH int padding() const { return size / 2 * dilation; }
  NAS_BOTH Region region(const Tiling& t) const {
    Region region = Region::of(t.rows, t.columns, t.slab, stride, spacing(), reach());
    region.border = padding();
    return region;
  }
};

// Numbers from one row of a tile to the next, for rows of `channels`: a multiple of 4, not of 32.
NAS_BOTH int row_pitch(int channels) { return round_up(channels, 4) + 4; }

// Halves a tile's rows or columns, whichever are more; false where a thread takes all of it.
inline bool halve(Tiling& t) {
  int& side = t.rows > kSide && t.rows >= t.columns ? t.rows : t.columns;
  if (side <= kSide) return false;
  side = round_up(side / 2, kSide);
  return true;
}

// Cuts planes into tiles of about kNumbers numbers that need no more shared memory than there is;
// `bytes` tells how much a tiling needs. Where it is short, tiles become smaller: with `whole`
// before channels are cut into slabs, down to a quarter of the numbers, else after that.
template <typename Bytes>
Tiling plan_tiles(int images, int height, int width, int channels, bool whole, Bytes&& bytes) {
  const int pixels = smaller(larger(kNumbers / channels, 16), 1024);
  int side = kSide;
  while (side * side < pixels) side *= 2;
  // a whole plane, or a multiple of what a thread takes
  const auto fit = [](int wish, int size) {
    return wish >= size ? size : larger(wish / kSide * kSide, smaller(kSide, size));
  };
  Tiling t{images, height, width, 1, 1, 1, smaller(channels, kThreads)};
  t.columns = fit(side, width);
  t.rows = fit(pixels / t.columns, height);
  if (t.rows == height && t.columns == width) {
    t.images = smaller(larger(pixels / (height * width), 1), images);
  }
  const auto fits = [&] { return bytes(t) <= kSharedBytes; };
  while (!fits() && t.images > 1) t.images /= 2;
  const Tiling wide = t;
  while (whole && !fits() && t.pixels() * channels > kNumbers / 4 && halve(t)) {}
  if (!fits()) t = wide;
  while (!fits() && t.slab > 16) t.slab = round_up(t.slab / 2, 8);
  while (!fits()) {
    if (halve(t)) continue;
    throw std::invalid_argument("the mixed operation has too many channels for a GPU's shared "
                                "memory: " + std::to_string(channels));
  }
  return t;
}

// The pixels of a plane that a region holds, from (y, x) of an image on.
struct Part {
  int image, images, y, x, height, width;

  // Those of a tile of the plane.
  NAS_DEVICE static Part of(const Tiling& t, const Tile& tile) {
    return {tile.image, tile.images, tile.y, tile.x, t.height, t.width};
  }
};

// Calls f(at, pixel, channel) for V channels at a time, by their place in the region, of `slab`; the
// pixel of the batch is negative outside of the plane.
template <int V, typename F>
NAS_DEVICE void for_region(const Region& region, const Tiling& t, const Part& part, int slab,
                           const F& f) {
  const int vectors = slab / V, cells = region.columns * vectors;
  const Divider by_vectors(vectors);
  const int lane = int(threadIdx.x) % 32;
  for (int row = int(threadIdx.x) / 32; row < t.images * region.rows; row += kWarps) {
    const int n = row / region.rows, y = part.y + row % region.rows;
    const bool inside = n < part.images && y >= 0 && y < part.height;
    const int64_t start = (int64_t(part.image + n) * part.height + y) * part.width;
    for (int i = lane; i < cells; i += 32) {
      const int column = by_vectors(i), channel = (i - column * vectors) * V;
      const int x = part.x + column;
      f((row * region.pitch + column) * region.cell + channel,
        inside && x >= 0 && x < part.width ? start + x : -1, channel);
    }
  }
}

// Fills a region with channels first..first + slab - 1, and zeros outside of the plane. read(pixel,
// channel, values) gives V channels of a pixel of the batch.
template <int V, typename A, typename Read>
NAS_DEVICE void load_region(const Region& region, const Tiling& t, const Part& part, int first,
                            int slab, A* to, const Read& read) {
  for_region<V>(region, t, part, slab, [&](int at, int64_t pixel, int channel) {
    A values[V] = {};
    if (pixel >= 0) read(pixel, first + channel, values);
    NAS_UNROLL for (int v = 0; v < V; ++v) to[at + v] = values[v];
  });
}

// 4 x 4 outputs of a depthwise convolution. Neighbouring outputs are kStep units of the input apart
// and neighbouring taps one; `row` and `column` are what a unit takes in memory.
template <int kSize, int kStep, typename A>
NAS_DEVICE void depthwise_block(const A* from, int row, int column,
                                const A (&taps)[kSize * kSize], A (&sum)[kSide][kSide]) {
  constexpr int kSpan = (kSide - 1) * kStep + kSize;
  NAS_UNROLL for (int r = 0; r < kSpan; ++r) {
    NAS_KEEP_ORDER;
    A in[kSpan];
    const A* at = from;
    NAS_UNROLL for (int c = 0; c < kSpan; ++c) {
      in[c] = *at;
      at += column;
    }
    from += row;
    NAS_UNROLL for (int i = 0; i < kSide; ++i) {
      const int tap = r - i * kStep;
      if (tap < 0 || tap >= kSize) continue;
      NAS_UNROLL for (int j = 0; j < kSide; ++j) {
        NAS_UNROLL for (int k = 0; k < kSize; ++k) {
          sum[i][j] += in[j * kStep + k] * taps[tap * kSize + k];
        }
      }
    }
  }
}

// Rectifies what a region holds.
template <typename A>
NAS_DEVICE void rectify(A* at, int64_t numbers) {
  for (int i = int(threadIdx.x); i < numbers; i += kThreads) at[i] = relu(at[i]);
}

// A depthwise convolution of a region into to [pixel of the tile][channel]. A thread keeps its
// channel, and so its taps, which start at `weights` and are `apart` from each other.
template <int kSize, int kStep, typename A, typename P>
NAS_DEVICE void depthwise_tile(const Region& region, const Tiling& t, const Steps& steps, int unit,
                               const A* from, int slab, const P* weights, int apart, A* to,
                               int pitch) {
  const int channel = int(threadIdx.x) % slab, worker = int(threadIdx.x) / slab;
  const int workers = kThreads / slab;
  if (worker >= workers) return;
  A taps[kSize * kSize];
  NAS_UNROLL for (int k = 0; k < kSize * kSize; ++k) taps[k] = A(weights[k * apart + channel]);
  const int spacing = steps.spacing(), group = kSide * spacing;
  const int down = round_up(t.rows, group) / kSide, across = round_up(t.columns, group) / kSide;
  for (int block = worker; block < t.images * down * across; block += workers) {
    const int bx = block % across, by = block / across % down, image = block / across / down;
    const int y = by / spacing * group + by % spacing, x = bx / spacing * group + bx % spacing;
    A sum[kSide][kSide] = {};
    const int origin =
        (image * region.rows + y * steps.stride) * region.pitch + x * steps.stride;
    depthwise_block<kSize, kStep>(from + origin * region.cell + channel,
                                  unit * region.pitch * region.cell, unit * region.cell, taps, sum);
    NAS_UNROLL for (int i = 0; i < kSide; ++i) {
      NAS_UNROLL for (int j = 0; j < kSide; ++j) {
        const int row = y + i * spacing, column = x + j * spacing;
        if (row < t.rows && column < t.columns) {
          to[((image * t.rows + row) * t.columns + column) * pitch + channel] = sum[i][j];
        }
      }
    }
  }
}

// Every kind of depthwise convolution is one of four in units of its own: under stride 1 a unit is
// the dilation; under stride 2 outputs are two units apart, or one where the dilation is two. The
// region's border may be larger than the convolution's.
template <typename A, typename P>
NAS_DEVICE void depthwise_tile(const Region& region, const Tiling& t, const Steps& steps,
                               const A* from, int slab, const P* weights, int apart, A* to,
                               int pitch) {
  const bool twice = steps.stride == 2 && steps.dilation == 1;
  from += region.inner(steps.padding());
  if (steps.size == 3) {
    if (twice) {
      depthwise_tile<3, 2>(region, t, steps, 1, from, slab, weights, apart, to, pitch);
    } else {
      depthwise_tile<3, 1>(region, t, steps, steps.dilation, from, slab, weights, apart, to, pitch);
    }
  } else if (twice) {
    depthwise_tile<5, 2>(region, t, steps, 1, from, slab, weights, apart, to, pitch);
  } else {
    depthwise_tile<5, 1>(region, t, steps, steps.dilation, from, slab, weights, apart, to, pitch);
  }
}

// How threads share rows of `channels` numbers: V neighbouring channels and every workers-th row.
struct Share {
  int across, workers;

  NAS_BOTH static Share of(int channels, int vector) {
    const int across = channels / vector;
    return {across, larger(1, kThreads / across)};
  }
  NAS_BOTH int items() const { return across * workers; }
  NAS_BOTH int numbers(int vector) const { return items() * vector; }
};

// Adds up what `workers` threads found for each of `columns` columns: from [worker][column].
template <typename A>
NAS_DEVICE A column_sum(const A* from, int workers, int columns, int column) {
  A total = A(0);
  for (int worker = 0; worker < workers; ++worker) total += from[worker * columns + column];
  return total;
}

}  // namespace nas::cuda
