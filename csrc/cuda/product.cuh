// Products of tiles in shared memory with matrices: the pointwise half of a convolution.

#pragma once

#include "tensor.cuh"
#include "tile.cuh"

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

constexpr int kDepth = 16;  // rows of a matrix that are in shared memory at once
// Numbers from one of them to the next on tensor cores: a warp reads four at a time, from places
// that this spreads over the banks.
NAS_BOTH int staged_pitch(int columns) {
  const int pitch = round_up(columns, 8);
  return pitch % 16 ? pitch : pitch + 8;
}
NAS_BOTH int staged_numbers(int columns) { return kDepth * staged_pitch(columns); }

// out[row][column] = sum over k of in[row][k] weight(k, column), for `rows` rows. `in` has zeros in
// columns `inputs` up to the next multiple of 4; `staged` is staged_numbers(outputs) of scratch. The
// threads meet before `in` is read and after `out` is written.
template <typename A, typename Weight>
NAS_DEVICE void scalar_product(const A* in, int in_pitch, int rows, int inputs, int outputs,
                               const Weight& weight, A* staged, A* out, int out_pitch) {
  const int across = (outputs + 3) / 4, down = (rows + 3) / 4, wide = across * 4;
  for (int start = 0; start < across * down; start += kThreads) {
    const int item = start + int(threadIdx.x);
    const bool mine = item < across * down;
    const int column = item % across * 4, row = item / across;
    const A* from[4];
    NAS_UNROLL for (int i = 0; i < 4; ++i) {
      from[i] = in + smaller(row + i * down, rows - 1) * in_pitch;
    }
    A sum[4][4] = {};
    for (int first = 0; first < inputs; first += kDepth) {
      const int depth = smaller(kDepth, round_up(inputs - first, 4));
      __syncthreads();
      for (int i = int(threadIdx.x); i < depth * wide; i += kThreads) {
        const int k = first + i / wide, c = i % wide;
        staged[i] = k < inputs && c < outputs ? weight(k, c) : A(0);
      }
      __syncthreads();
      if (!mine) continue;
      for (int k = 0; k < depth; k += 4) {
        Quad<A> left[4];
        NAS_UNROLL for (int i = 0; i < 4; ++i) left[i] = quad(from[i] + first + k);
        NAS_UNROLL for (int part = 0; part < 4; ++part) {
          const Quad<A> right = quad(staged + (k + part) * wide + column);
          NAS_UNROLL for (int i = 0; i < 4; ++i) {
            NAS_UNROLL for (int j = 0; j < 4; ++j) {
              sum[i][j] += left[i].value[part] * right.value[j];
            }
          }
        }
      }
    }
    if (!mine) continue;
    NAS_UNROLL for (int i = 0; i < 4; ++i) {
      if (row + i * down >= rows) continue;
      Quad<A> four;
      NAS_UNROLL for (int j = 0; j < 4; ++j) four.value[j] = sum[i][j];
      *reinterpret_cast<Quad<A>*>(out + (row + i * down) * out_pitch + column) = four;
    }
  }
  __syncthreads();
}

constexpr int kWarps = kThreads / 32;
constexpr int kStrip = 4;  // tiles of 16 x 8 entries that a warp sums at once

// The same on tensor cores.
template <typename Weight>
NAS_DEVICE void tensor_product(const float* in, int in_pitch, int rows, int inputs, int outputs,
                               const Weight& weight, float* staged, float* out, int out_pitch) {
  const int pitch = staged_pitch(outputs);
  const int down = (rows + kRows - 1) / kRows, across = (outputs + kColumns - 1) / kColumns;
  const int strips = (across + kStrip - 1) / kStrip, last = (outputs + 3) / 4 * 4;
  const int lane = int(threadIdx.x) % 32, q = lane / 4, r = lane % 4;
  for (int start = 0; start < down * strips; start += kWarps) {
    const int item = start + int(threadIdx.x) / 32;
    const bool mine = item < down * strips;
    const int top = item / strips * kRows + q, strip = item % strips * kStrip;
    const float* from[2];
    NAS_UNROLL for (int i = 0; i < 2; ++i) {
      from[i] = in + smaller(top + 8 * i, rows - 1) * in_pitch + r;
    }
    Entries sum[kStrip] = {};
    for (int first = 0; first < inputs; first += kDepth) {
      const int depth = smaller(kDepth, round_up(inputs - first, kInner));
      __syncthreads();
      for (int i = int(threadIdx.x); i < depth * pitch; i += kThreads) {
        const int k = first + i / pitch, c = i % pitch;
        staged[i] = k < inputs && c < outputs ? round_to_tf32(weight(k, c)) : 0.0f;
      }
      __syncthreads();
      if (!mine) continue;
      for (int k = 0; k < depth; k += kInner) {
        Left left;
        NAS_UNROLL for (int i = 0; i < 4; ++i) {
          const int column = first + k + i / 2 * 4;
          left.at[i] = column + r < inputs ? round_to_tf32(from[i % 2][column]) : 0.0f;
        }
        NAS_UNROLL for (int n = 0; n < kStrip; ++n) {
          if (strip + n >= across) continue;
          const float* at = staged + (k + r) * pitch + (strip + n) * kColumns + q;
          multiply_add(sum[n], left, {at[0], at[4 * pitch]});
        }
      }
    }
    if (!mine) continue;
    NAS_UNROLL for (int n = 0; n < kStrip; ++n) {
      const int column = (strip + n) * kColumns + 2 * r;
      NAS_UNROLL for (int i = 0; i < 2; ++i) {
        const int row = top + 8 * i;
        if (row >= rows || column >= last) continue;
        *reinterpret_cast<Pack<float, 2>*>(out + row * out_pitch + column) = {
            {sum[n].at[2 * i], sum[n].at[2 * i + 1]}};
      }
    }
  }
  __syncthreads();
}

// The one or the other, by how exact images are.
template <typename T, typename Weight>
NAS_DEVICE void product(const Sum<T>* in, int in_pitch, int rows, int inputs, int outputs,
                        const Weight& weight, Sum<T>* staged, Sum<T>* out, int out_pitch) {
  if constexpr (kOnTensorCores<T>) {
    tensor_product(in, in_pitch, rows, inputs, outputs, weight, staged, out, out_pitch);
  } else {
    scalar_product(in, in_pitch, rows, inputs, outputs, weight, staged, out, out_pitch);
  }
}

// Zeros in the columns between `channels` and the next multiple of 4.
template <typename A>
NAS_DEVICE void clear_padding(A* tile, int rows, int channels, int pitch) {
  const int extra = round_up(channels, 4) - channels;
  for (int i = int(threadIdx.x); i < rows * extra; i += kThreads) {
    tile[i / extra * pitch + channels + i % extra] = A(0);
  }
}

}  // namespace nas::cuda
