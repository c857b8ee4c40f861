// 3x3 max and average pooling, padding 1; the average counts real pixels only. Pools have no
// parameters: they are computed once a state, for all edges that leave it.

#pragma once

#include "patch.cuh"

namespace nas::cuda {

struct Window {  // rows or columns of the input that an output sees
  int first, last;

  NAS_BOTH static Window of(int output, int stride, int size) {
    return {larger(output * stride - 1, 0), smaller(output * stride + 2, size)};
  }
  NAS_BOTH int count() const { return last - first; }
};

// Pools of a tile whose input, not rectified, is in shared memory.
template <typename A>
struct PoolTile {
  const Tiling& t;
  const Tile& tile;
  Region region;
  const A* from;
  int stride, height, width;  // of the input
  int channels;               // that are in the region

  // One output of four channels: maximum or average, and where in its window each maximum is.
  template <bool kAverage>
  NAS_DEVICE void window(int pixel, int channel, A (&result)[4], uint8_t (&where)[4]) const {
    const int left = pixel % t.columns, below = pixel / t.columns;
    const int top = below % t.rows, image = below / t.rows;
    const int y = (tile.y + top) * stride - 1, x = (tile.x + left) * stride - 1;
    const Window rows = Window::of(tile.y + top, stride, height);
    const Window columns = Window::of(tile.x + left, stride, width);
    const A* corner = from + region.inner(1) + channel +
                      ((image * region.rows + top * stride) * region.pitch + left * stride) *
                          region.cell;
    bool begin = true;
    for (int r = rows.first; r < rows.last; ++r) {
      for (int c = columns.first; c < columns.last; ++c) {
        const A* at = corner + ((r - y) * region.pitch + c - x) * region.cell;
        NAS_UNROLL for (int j = 0; j < 4; ++j) {
          const A value = channel + j < channels ? at[j] : A(0);
          if (kAverage) {
            result[j] += value;
          } else if (begin || exceeds(value, result[j])) {
            result[j] = value;
            where[j] = uint8_t((r - y) * 3 + c - x);
          }
        }
        begin = false;
      }
    }
    if (!kAverage) return;
    const A each = A(1) / A(rows.count() * columns.count());
    NAS_UNROLL for (int j = 0; j < 4; ++j) result[j] *= each;
  }

  // Calls put(patch, where) for all of the tile, by all threads together.
  template <bool kAverage, typename Put>
  NAS_DEVICE void run(const Put& put) const {
    const Patches patches = Patches::of(t.pixels(), channels);
    for (int start = 0; start < patches.count(); start += kWarps) {
      Patch<A, 4> patch = patches.patch<A>(start + int(threadIdx.x) / 32);
      uint8_t where[4][4] = {};
      NAS_UNROLL for (int i = 0; i < 4; ++i) {
        const int pixel = patch.row + i * patch.step;
        if (patch.column >= channels || pixel >= t.pixels()) continue;
        window<kAverage>(pixel, patch.column, patch.at[i], where[i]);
      }
      put(patch, where);
    }
  }
};

}  // namespace nas::cuda
