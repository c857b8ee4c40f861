// Depthwise convolutions of one plane: [row][column] of Vec, each lane a channel of its own.
//
// Inputs are padded planes; `pitch` is the distance of their rows in Vecs. K is the kernel size,
// D the dilation, S the stride. All loops that matter run over pixels with the taps unrolled, so
// that a block of accumulators stays in registers.

#pragma once

#include "vector.h"

namespace nas::NAS_ISA {

// Columns x, x + 1, ... of one output row; `Count` at a time, then the rest in smaller steps.
template <int Count, typename Block>
NAS_INLINE void for_columns(int64_t begin, int64_t width, Block&& block) {
  int64_t x = begin;
  for (; x + Count <= width; x += Count) block(std::integral_constant<int, Count>{}, x);
  if constexpr (Count > 1) for_columns<Count / 2>(x, width, block);
}

// sum[i] += sum over taps of taps[ky * K + kx] * in[ky * D * pitch + i * S + kx * D]
template <int K, int D, int S, int Count, typename T>
NAS_INLINE void depthwise_block(const Vec<T>* in, int64_t pitch, const Vec<T>* taps,
                                Vec<T> (&sum)[Count]) {
  NAS_UNROLL for (int ky = 0; ky < K; ++ky) {
    const Vec<T>* row = in + ky * D * pitch;
    NAS_UNROLL for (int kx = 0; kx < K; ++kx) {
      const Vec<T> tap = taps[ky * K + kx];
      NAS_UNROLL for (int i = 0; i < Count; ++i) sum[i] += tap * row[i * S + kx * D];
    }
  }
}

// out[x] (+)= that, from in[x * S] on.
template <int K, int D, int S, typename T>
void depthwise_row(const Vec<T>* in, int64_t pitch, const Vec<T>* taps, Vec<T>* out, int64_t width,
                   bool accumulate) {
  for_columns<kPixels>(0, width, [&](auto block, int64_t x) NAS_INLINED {
    constexpr int count = decltype(block)::value;
    Vec<T> sum[count];
    NAS_UNROLL for (int i = 0; i < count; ++i) sum[i] = accumulate ? out[x + i] : Vec<T>::zero();
    depthwise_block<K, D, S>(in + x * S, pitch, taps, sum);
    NAS_UNROLL for (int i = 0; i < count; ++i) out[x + i] = sum[i];
  });
}

// Gradient of a row of the input under stride 2; rows and columns of parity PY and PX.
//
// The input pixel i saw output y through tap k where i = 2 y - q + k D, with q = D (K / 2): only
// taps of the right parity. `row` is the padded gradient's row i / 2, at its first column.
template <int K, int D, int PY, int PX, typename T>
NAS_INLINE void spread_columns(const Vec<T>* row, int64_t pitch, const Vec<T>* taps, Vec<T>* out,
                               int64_t width, bool accumulate) {
  constexpr int q = D * (K / 2);
  for_columns<kPixels>(0, (width + 1 - PX) / 2, [&](auto block, int64_t x) NAS_INLINED {
    constexpr int count = decltype(block)::value;
    Vec<T> sum[count];
    NAS_UNROLL for (int i = 0; i < count; ++i) {
      sum[i] = accumulate ? out[2 * (x + i) + PX] : Vec<T>::zero();
    }
    NAS_UNROLL for (int ky = 0; ky < K; ++ky) {
      NAS_UNROLL for (int kx = 0; kx < K; ++kx) {
        if ((PY + q - ky * D) % 2 == 0 && (PX + q - kx * D) % 2 == 0) {
          const Vec<T>* from = row + (PY + q - ky * D) / 2 * pitch + x + (PX + q - kx * D) / 2;
          const Vec<T> tap = taps[ky * K + kx];
          NAS_UNROLL for (int i = 0; i < count; ++i) sum[i] += tap * from[i];
        }
      }
    }
    NAS_UNROLL for (int i = 0; i < count; ++i) out[2 * (x + i) + PX] = sum[i];
  });
}

template <int K, int D, typename T>
void depthwise_strided_gradient_row(const Vec<T>* gradient, int64_t pitch, const Vec<T>* taps,
                                    Vec<T>* out, int64_t width, int64_t y, bool accumulate) {
  const Vec<T>* row = gradient + y / 2 * pitch;
  if (y % 2) {
    spread_columns<K, D, 1, 0>(row, pitch, taps, out, width, accumulate);
    spread_columns<K, D, 1, 1>(row, pitch, taps, out, width, accumulate);
  } else {
    spread_columns<K, D, 0, 0>(row, pitch, taps, out, width, accumulate);
    spread_columns<K, D, 0, 1>(row, pitch, taps, out, width, accumulate);
  }
}

// total[ky * K + kx] += sum over the plane of gradient[y][x] * in[y * S + ky * D][x * S + kx * D]
template <int K, int D, int S, typename T>
void depthwise_weight_gradient(const Vec<T>* in, int64_t pitch, const Vec<T>* gradient,
                               int64_t gradient_pitch, int64_t height, int64_t width,
                               Vec<T>* total) {
  // Sums of alternate columns are kept apart, so that no addition waits for the one before.
  constexpr int kSets = kManyRegisters ? 2 : 1;
  for (int ky = 0; ky < K; ++ky) {
    Vec<T> sum[kSets][K];
    NAS_UNROLL for (int set = 0; set < kSets; ++set) {
      NAS_UNROLL for (int kx = 0; kx < K; ++kx) sum[set][kx] = Vec<T>::zero();
    }
    for (int64_t y = 0; y < height; ++y) {
      const Vec<T>* row = in + (y * S + ky * D) * pitch;
      const Vec<T>* g = gradient + y * gradient_pitch;
      int64_t x = 0;
      for (; x + kSets <= width; x += kSets) {
        NAS_UNROLL for (int set = 0; set < kSets; ++set) {
          const Vec<T> value = g[x + set];
          NAS_UNROLL for (int kx = 0; kx < K; ++kx) {
            sum[set][kx] += value * row[(x + set) * S + kx * D];
          }
        }
      }
      for (; x < width; ++x) {
        NAS_UNROLL for (int kx = 0; kx < K; ++kx) sum[0][kx] += g[x] * row[x * S + kx * D];
      }
    }
    NAS_UNROLL for (int kx = 0; kx < K; ++kx) {
      NAS_UNROLL for (int set = 0; set < kSets; ++set) total[ky * K + kx] += sum[set][kx];
    }
  }
}

// The three kernels of one kind of convolution, chosen once.
template <typename T>
struct Depthwise {
  int size, dilation, stride;
  void (*row)(const Vec<T>*, int64_t, const Vec<T>*, Vec<T>*, int64_t, bool);
  void (*weight_gradient)(const Vec<T>*, int64_t, const Vec<T>*, int64_t, int64_t, int64_t,
                          Vec<T>*);
  // Under stride 2; under stride 1 the gradient is the convolution with the taps turned around.
  void (*strided_gradient_row)(const Vec<T>*, int64_t, const Vec<T>*, Vec<T>*, int64_t, int64_t,
                               bool);
  void (*gradient_row)(const Vec<T>*, int64_t, const Vec<T>*, Vec<T>*, int64_t, bool);

  int padding() const { return dilation * (size / 2); }
  int taps() const { return size * size; }

  template <int K, int D, int S> static Depthwise of() {
    return {K, D, S, depthwise_row<K, D, S, T>, depthwise_weight_gradient<K, D, S, T>,
            depthwise_strided_gradient_row<K, D, T>, depthwise_row<K, D, 1, T>};
  }
  static Depthwise choose(int size, int dilation, int stride) {
    if (size == 3) {
      if (dilation == 1) return stride == 1 ? of<3, 1, 1>() : of<3, 1, 2>();
      return stride == 1 ? of<3, 2, 1>() : of<3, 2, 2>();
    }
    if (dilation == 1) return stride == 1 ? of<5, 1, 1>() : of<5, 1, 2>();
    return stride == 1 ? of<5, 2, 1>() : of<5, 2, 2>();
  }
};

}  // namespace nas::NAS_ISA
