// Patches: what threads have of a tile's results in registers, and its way to global memory and
// into the sums of a normalisation.

#pragma once

#include "statistics.cuh"

namespace nas::cuda {

// Four numbers of shared memory that lie together.
template <typename A>
struct alignas(16) Quad {
  A value[4];
};
template <typename A>
NAS_DEVICE Quad<A> quad(const A* at) {
  return *reinterpret_cast<const Quad<A>*>(at);
}

// Four neighbouring columns of the rows row, row + step, ...
template <typename A, int kCount>
struct Patch {
  int row, step, column;  // the column is behind the last where a thread has nothing
  int lanes;              // the lane that is as many further in a warp has the same columns
  int beside;             // the lane of which this bit differs has the rest of eight columns
  A at[kCount][4];
};

// How warps share the 4 x 4 patches of `rows` x `columns` numbers: 32 at a time, as many side by
// side as a power of two allows, so that lanes find those with their columns, or with the ones
// beside them, by shuffles.
struct Patches {
  int rows, columns, down, wide, pieces;

  NAS_DEVICE static Patches of(int rows, int columns) {
    const int across = (columns + 3) / 4;
    Patches patches{rows, columns, (rows + 3) / 4, 1, 1};
    while (patches.wide < across && patches.wide < 32) patches.wide *= 2;
    patches.pieces = (across + patches.wide - 1) / patches.wide;
    return patches;
  }
  NAS_DEVICE int count() const {  // of a warp's 32
    const int high = 32 / wide;
    return pieces * ((down + high - 1) / high);
  }
  template <typename A>
  NAS_DEVICE Patch<A, 4> patch(int number) const {
    const int lane = int(threadIdx.x) % 32;
    const int row = number / pieces * (32 / wide) + lane / wide;
    const int column = (number % pieces * wide + lane % wide) * 4;
    return {row, down, row < down ? column : columns, wide, 1, {}};
  }
};

// A patch of `rows` rows goes to shared memory, whose columns up to the next multiple of 4 exist.
template <typename A>
struct ToShared {
  A* out;
  int pitch, rows, columns;

  template <int kCount>
  NAS_DEVICE void operator()(const Patch<A, kCount>& patch) const {
    if (patch.column >= columns) return;
    NAS_UNROLL for (int i = 0; i < kCount; ++i) {
      const int row = patch.row + i * patch.step;
      if (row >= rows) continue;
      Quad<A> four;
      NAS_UNROLL for (int j = 0; j < 4; ++j) four.value[j] = patch.at[i][j];
      *reinterpret_cast<Quad<A>*>(out + row * pitch + patch.column) = four;
    }
  }
};

// Where the pixels of a tile are in the batch, after its first one; negative outside of the plane.
NAS_DEVICE void find_places(const Tiling& t, const Tile& tile, int* places) {
  for (int p = int(threadIdx.x); p < t.pixels(); p += kThreads) {
    const Pixel pixel = Pixel::of(t, tile, p);
    places[p] = pixel.inside ? int(pixel.at - tile.start(t)) : -1;
  }
}

// Sums of a block for the normalisations of several jobs: of differences to the first number that
// the block meets in a channel. A warp adds up what its lanes have of a channel, then the warps'
// sums are folded, tile by tile.
template <typename A>
struct JobSums {
  A* sums;        // [shift, sum, square][channel] of the first job
  int64_t apart;  // those of the next one
  A* by_warp;     // [warp][sum, square][channel], zeros but between add and fold
  int channels;

  // In shared memory for `jobs` jobs, or none: they are then where the block's moments are to be.
  NAS_BOTH static JobSums take(Arena& arena, int jobs, int channels) {
    A* sums = arena.take<A>(int64_t(jobs) * 3 * channels);
    return {sums, 3 * channels, arena.take<A>(int64_t(kWarps) * 2 * channels), channels};
  }
  NAS_DEVICE A* shift(int job) const { return sums + job * apart; }

  NAS_DEVICE void start(int jobs) const {
    for (int i = int(threadIdx.x); i < 3 * channels; i += kThreads) {
      for (int job = 0; job < jobs; ++job) shift(job)[i] = A(0);
    }
    for (int i = int(threadIdx.x); i < kWarps * 2 * channels; i += kThreads) by_warp[i] = A(0);
  }
  // All lanes of a warp together: numbers of four channels, as in a patch, of those before `last`.
  NAS_DEVICE void add(int channel, int last, int lanes, A (&sum)[4], A (&square)[4]) const {
    for (int mask = lanes; mask < 32; mask *= 2) {
      NAS_UNROLL for (int j = 0; j < 4; ++j) {
        sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], mask);
        square[j] += __shfl_xor_sync(0xffffffffu, square[j], mask);
      }
    }
    if (int(threadIdx.x) % 32 >= lanes) return;
    A* to = by_warp + int(threadIdx.x) / 32 * 2 * channels + channel;
    NAS_UNROLL for (int j = 0; j < 4; ++j) {
      if (channel + j >= last) continue;
      to[j] += sum[j];
      to[channels + j] += square[j];
    }
  }
  // Between two barriers.
  NAS_DEVICE void fold(int job) const {
    A* to = shift(job) + channels;
    for (int i = int(threadIdx.x); i < 2 * channels; i += kThreads) {
      A total = A(0);
      NAS_UNROLL for (int warp = 0; warp < kWarps; ++warp) {
        A& part = by_warp[warp * 2 * channels + i];
        total += part;
        part = A(0);
      }
      to[i] += total;
    }
  }
  // After a barrier: what this block found over `count` numbers a channel. `to` may be where the
  // sums are.
  NAS_DEVICE void finish(int job, A count, A* to) const {
    const A* from = shift(job);
    for (int c = int(threadIdx.x); c < channels; c += kThreads) {
      const A first = from[c], total = from[channels + c], square = from[2 * channels + c];
      to[c] = count;
      to[channels + c] = first + total / count;
      to[2 * channels + c] = square - total * total / count;
    }
  }
};

// Stores patches of a tile's pixels.
template <int V, typename T>
struct Stored {
  T* to;              // the tile's first pixel [pixel][channel]
  const int* places;  // see find_places
  int pixels, channels;
  int first, last;    // channels that are the patches' columns

  // Where row i of a patch is, after the tile's first pixel; negative where nothing is to be stored.
  template <typename A, int kCount>
  NAS_DEVICE int place(const Patch<A, kCount>& patch, int i) const {
    const int pixel = patch.row + i * patch.step;
    return first + patch.column < last && pixel < pixels ? places[pixel] : -1;
  }
  // Calls f(row of the patch, its place) for all that are in the plane.
  template <typename A, int kCount, typename F>
  NAS_DEVICE void for_inside(const Patch<A, kCount>& patch, F&& f) const {
    NAS_UNROLL for (int i = 0; i < kCount; ++i) {
      const int place = this->place(patch, i);
      if (place >= 0) f(i, place);
    }
  }
  // All lanes of a warp together.
  template <typename A, int kCount>
  NAS_DEVICE void operator()(const Patch<A, kCount>& patch) const {
    if constexpr (V == 2 * kQuad && kWide<T> == V) {
      store_halves(patch);
    } else {
      store_rows(patch);
    }
  }

 private:
  static constexpr int kQuad = 4;

  NAS_DEVICE T* at(int place, int channel) const {
    return to + int64_t(place) * channels + channel;
  }

  template <typename A, int kCount>
  NAS_DEVICE void store_rows(const Patch<A, kCount>& patch) const {
    constexpr int kPiece = V < kQuad ? V : kQuad;
    const int channel = first + patch.column;
    for_inside(patch, [&](int i, int place) {
      NAS_UNROLL for (int j = 0; j < kQuad; j += kPiece) {
        if (channel + j >= last) continue;
        A piece[kPiece];
        NAS_UNROLL for (int k = 0; k < kPiece; ++k) piece[k] = patch.at[i][j + k];
        store<kPiece>(at(place, channel + j), piece);
      }
    });
  }

  // Of numbers of two bytes, 16 bytes are the columns of two lanes: these exchange half of their
  // rows, so that each stores eight columns of the other half.
  template <typename A, int kCount>
  NAS_DEVICE void store_halves(const Patch<A, kCount>& patch) const {
    constexpr int kHalf = kCount / 2;
    const bool right = patch.column % V != 0;
    const int channel = first + patch.column - right * kQuad;
    NAS_UNROLL for (int i = 0; i < kHalf; ++i) {
      const uint64_t upper = packed<T>(patch.at[i]), lower = packed<T>(patch.at[kHalf + i]);
      const uint64_t got = __shfl_xor_sync(0xffffffffu, right ? upper : lower, patch.beside);
      const int place = this->place(patch, right ? kHalf + i : i);
      if (place < 0) continue;
      const uint64_t both[2] = {right ? got : upper, right ? lower : got};
      store_packed(at(place, channel), both);
    }
  }
};

// And adds them up. All threads of a block call it together.
template <int V, typename T>
struct Output {
  using A = Sum<T>;
  Stored<V, T> stored;
  JobSums<A> sums;
  int job;
  bool begins;        // no tile came before
  bool summed;

  template <int kCount>
  NAS_DEVICE void operator()(const Patch<A, kCount>& patch) const {
    stored(patch);
    if (!summed) return;
    const int channel = stored.first + patch.column, last = stored.last;
    A* shift = sums.shift(job) + channel;
    if (begins) {
      if (patch.row == 0) {
        NAS_UNROLL for (int j = 0; j < 4; ++j) {
          if (channel + j < last) shift[j] = patch.at[0][j];
        }
      }
      __syncthreads();
    }
    A centre[4], sum[4] = {}, square[4] = {};
    NAS_UNROLL for (int j = 0; j < 4; ++j) centre[j] = channel + j < last ? shift[j] : A(0);
    stored.for_inside(patch, [&](int i, int) {
      NAS_UNROLL for (int j = 0; j < 4; ++j) {
        const A distance = patch.at[i][j] - centre[j];
        sum[j] += distance;
        square[j] += distance * distance;
      }
    });
    sums.add(channel, last, patch.lanes, sum, square);
  }
};

}  // namespace nas::cuda
