// Products of tiles in shared memory with matrices: the pointwise half of a convolution.

#pragma once

#include "patch.cuh"
#include "tensor.cuh"

namespace nas::cuda {

constexpr int kDepth = 16;  // rows of a matrix that are in shared memory at once
// Numbers from one of them to the next on tensor cores: a warp reads four at a time, from places
// that this spreads over the banks.
NAS_BOTH int staged_pitch(int columns) {
  const int pitch = round_up(columns, 8);
  return pitch % 16 ? pitch : pitch + 8;
}
NAS_BOTH int staged_numbers(int columns) { return kDepth * staged_pitch(columns); }

// put(patch) gets all of  sum over k of in[row][k] weight(k, column), for `rows` rows; the block's
// threads call it together. `in` has zeros in columns `inputs` up to the next multiple of 4;
// `staged` is staged_numbers(outputs) of scratch. The threads meet before `in` is read and at the
// end.
template <typename A, typename Weight, typename Put>
NAS_DEVICE void scalar_product(const A* in, int in_pitch, int rows, int inputs, int outputs,
                               const Weight& weight, A* staged, const Put& put) {
  const Patches patches = Patches::of(rows, outputs);
  const int wide = round_up(outputs, 4);
  for (int start = 0; start < patches.count(); start += kWarps) {
    Patch<A, 4> patch = patches.patch<A>(start + int(threadIdx.x) / 32);
    const bool mine = patch.column < outputs;
    const A* from[4];
    NAS_UNROLL for (int i = 0; i < 4; ++i) {
      from[i] = in + smaller(patch.row + i * patch.step, rows - 1) * in_pitch;
    }
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
          const Quad<A> right = quad(staged + (k + part) * wide + patch.column);
          NAS_UNROLL for (int i = 0; i < 4; ++i) {
            NAS_UNROLL for (int j = 0; j < 4; ++j) {
              patch.at[i][j] += left[i].value[part] * right.value[j];
            }
          }
        }
      }
    }
    put(patch);
  }
  __syncthreads();
}

constexpr int kStrip = 4;  // tiles of 16 x 8 entries that a warp sums at once

// A lane's entries in two neighbouring tiles are pairs of columns: lanes exchange pairs, so that
// each has four columns of one tile.
NAS_DEVICE Patch<float, 2> pair_up(const Entries& even, const Entries& odd, int top, int column,
                                   int outputs) {
  const int r = int(threadIdx.x) % 4;
  const bool second = r % 2;
  column += second * kColumns + r / 2 * 4;
  Patch<float, 2> patch{top, 8, smaller(column, outputs), 4, 2, {}};
  NAS_UNROLL for (int i = 0; i < 2; ++i) {
    NAS_UNROLL for (int j = 0; j < 2; ++j) {
      const float own = second ? odd.at[2 * i + j] : even.at[2 * i + j];
      const float given = second ? even.at[2 * i + j] : odd.at[2 * i + j];
      const float got = __shfl_xor_sync(0xffffffffu, given, 1);
      patch.at[i][j] = second ? got : own;
      patch.at[i][2 + j] = second ? own : got;
    }
  }
  return patch;
}

// The same on tensor cores.
template <typename Weight, typename Put>
NAS_DEVICE void tensor_product(const float* in, int in_pitch, int rows, int inputs, int outputs,
                               const Weight& weight, float* staged, const Put& put) {
  const int pitch = staged_pitch(outputs);
  const int down = (rows + kRows - 1) / kRows, across = (outputs + kColumns - 1) / kColumns;
  const int strips = (across + kStrip - 1) / kStrip;
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
    NAS_UNROLL for (int n = 0; n < kStrip; n += 2) {
      if (n >= across) continue;  // by none of the warps
      const int column = mine ? (strip + n) * kColumns : outputs;
      put(pair_up(sum[n], sum[n + 1], top, column, outputs));
    }
  }
  __syncthreads();
}

// The one or the other, by how exact images are.
template <typename T, typename Weight, typename Put>
NAS_DEVICE void product(const Sum<T>* in, int in_pitch, int rows, int inputs, int outputs,
                        const Weight& weight, Sum<T>* staged, const Put& put) {
  if constexpr (kOnTensorCores<T>) {
    tensor_product(in, in_pitch, rows, inputs, outputs, weight, staged, put);
  } else {
    scalar_product(in, in_pitch, rows, inputs, outputs, weight, staged, put);
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
