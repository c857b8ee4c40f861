// Gradients of matrices: sums over pixels of outer products.

#pragma once

#include "product.cuh"

namespace nas::cuda {

constexpr int kOuter = kThreads * 16;  // numbers of scratch that a matrix's gradient ends with

// sum over rows of left[row][i] right[row][o], for a block's rows. A thread keeps 4 x 4 entries in
// registers; where there are fewer entries than that, threads share the rows; where there are more,
// the sums are in the block's own part of global memory.
template <typename A>
class ScalarMatrixGradient {
 public:
  // `begun`: what is at `to` is added to.
  NAS_DEVICE ScalarMatrixGradient(int inputs, int outputs, int pitch, A* to, bool begun = false)
      : inputs_(inputs), outputs_(outputs), pitch_(pitch), to_(to), begun_(begun),
        across_(larger(1, (outputs + 3) / 4)), items_((inputs + 3) / 4 * across_),
        slices_(larger(1, kThreads / items_)) {}

  // Adds `rows` rows; columns of both up to the next multiple of 4 can be read.
  NAS_DEVICE void add(const A* left, int left_pitch, const A* right, int right_pitch, int rows) {
    if (resident()) {
      const int item = int(threadIdx.x) % items_, slice = int(threadIdx.x) / items_;
      if (slice < slices_) add(item, slice, left, left_pitch, right, right_pitch, rows, sum_);
    } else {
      for (int item = int(threadIdx.x); item < items_; item += kThreads) {
        A sum[4][4] = {};
        add(item, 0, left, left_pitch, right, right_pitch, rows, sum);
        write(item, [&](int i, int j, A& to) { to = begun_ ? to + sum[i][j] : sum[i][j]; });
      }
      begun_ = true;
    }
  }

  // Leaves the sums in global memory. `scratch` has kOuter numbers; the threads must have met since
  // it was used.
  NAS_DEVICE void finish(A* scratch) {
    if (!resident()) return;
    const int item = int(threadIdx.x) % items_, slice = int(threadIdx.x) / items_;
    if (slice < slices_) {
      NAS_UNROLL for (int i = 0; i < 16; ++i) {
        scratch[i * slices_ * items_ + slice * items_ + item] = sum_[i / 4][i % 4];
      }
    }
    __syncthreads();
    if (slice == 0) {
      write(item, [&](int i, int j, A& to) {
        const A sum = column_sum(scratch + (i * 4 + j) * slices_ * items_, slices_, items_, item);
        to = begun_ ? to + sum : sum;
      });
    }
    __syncthreads();
  }

 private:
  NAS_DEVICE bool resident() const { return items_ <= kThreads; }

  NAS_DEVICE void add(int item, int slice, const A* left, int left_pitch, const A* right,
                      int right_pitch, int rows, A (&sum)[4][4]) const {
    left += item / across_ * 4;
    right += item % across_ * 4;
    for (int row = slice; row < rows; row += slices_) {
      const Quad<A> a = quad(left + row * left_pitch), b = quad(right + row * right_pitch);
      NAS_UNROLL for (int i = 0; i < 4; ++i) {
        NAS_UNROLL for (int j = 0; j < 4; ++j) sum[i][j] += a.value[i] * b.value[j];
      }
    }
  }
  template <typename F>
  NAS_DEVICE void write(int item, F&& f) const {
    const int row = item / across_ * 4, column = item % across_ * 4;
    NAS_UNROLL for (int i = 0; i < 4; ++i) {
      NAS_UNROLL for (int j = 0; j < 4; ++j) {
        if (row + i < inputs_ && column + j < outputs_) {
          f(i, j, to_[(row + i) * pitch_ + column + j]);
        }
      }
    }
  }

  int inputs_, outputs_, pitch_;
  A* to_;
  bool begun_;
  int across_, items_, slices_;
  A sum_[4][4] = {};
};

// The same on tensor cores. A warp sums kStrip tiles of the matrix; where there are
// fewer, warps share the rows.
class TensorMatrixGradient {
 public:
  NAS_DEVICE TensorMatrixGradient(int inputs, int outputs, int pitch, float* to,
                                  bool begun = false)
      : inputs_(inputs), outputs_(outputs), pitch_(pitch), to_(to), begun_(begun),
        across_(larger(1, (outputs + kColumns - 1) / kColumns)),
        tiles_((inputs + kRows - 1) / kRows * across_), groups_((tiles_ + kStrip - 1) / kStrip),
        slices_(larger(1, kWarps / groups_)) {}

  NAS_DEVICE void add(const float* left, int left_pitch, const float* right, int right_pitch,
                      int rows) {
    const int warp = int(threadIdx.x) / 32;
    if (resident()) {
      const int slice = warp / groups_;
      if (slice < slices_) {
        add(warp % groups_, slice, left, left_pitch, right, right_pitch, rows, sum_);
      }
    } else {
      for (int group = warp; group < groups_; group += kWarps) {
        Entries sum[kStrip] = {};
        add(group, 0, left, left_pitch, right, right_pitch, rows, sum);
        write(group, [&](int i, float& to) {
          to = begun_ ? to + sum[i / 4].at[i % 4] : sum[i / 4].at[i % 4];
        });
      }
      begun_ = true;
    }
  }

  NAS_DEVICE void finish(float* scratch) {
    if (!resident()) return;
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const int group = warp % groups_, slice = warp / groups_, across = groups_ * 32;
    const int column = group * 32 + lane;
    if (slice < slices_) {
      NAS_UNROLL for (int i = 0; i < 4 * kStrip; ++i) {
        scratch[(i * slices_ + slice) * across + column] = sum_[i / 4].at[i % 4];
      }
    }
    __syncthreads();
    if (slice == 0) {
      write(group, [&](int i, float& to) {
        const float sum = column_sum(scratch + i * slices_ * across, slices_, across, column);
        to = begun_ ? to + sum : sum;
      });
    }
    __syncthreads();
  }

 private:
  NAS_DEVICE bool resident() const { return groups_ <= kWarps; }

  // The factors' rows are what is summed over: the left one is read transposed.
  NAS_DEVICE void add(int group, int slice, const float* left, int left_pitch, const float* right,
                      int right_pitch, int rows, Entries (&sum)[kStrip]) const {
    const int lane = int(threadIdx.x) % 32, q = lane / 4, r = lane % 4;
    for (int first = slice * kInner; first < rows; first += slices_ * kInner) {
      NAS_UNROLL for (int n = 0; n < kStrip; ++n) {
        const int tile = group * kStrip + n;
        if (tile >= tiles_) continue;
        const int i = tile / across_ * kRows + q, o = tile % across_ * kColumns + q;
        Left a;
        Right b;
        NAS_UNROLL for (int part = 0; part < 4; ++part) {
          const int row = first + r + part / 2 * 4, column = i + part % 2 * 8;
          const bool inside = row < rows && column < inputs_;
          a.at[part] = inside ? round_to_tf32(left[row * left_pitch + column]) : 0.0f;
        }
        NAS_UNROLL for (int part = 0; part < 2; ++part) {
          const int row = first + r + part * 4;
          const bool inside = row < rows && o < outputs_;
          b.at[part] = inside ? round_to_tf32(right[row * right_pitch + o]) : 0.0f;
        }
        multiply_add(sum[n], a, b);
      }
    }
  }
  // Calls f(entry of the lane, its place) for those that are in the matrix.
  template <typename F>
  NAS_DEVICE void write(int group, F&& f) const {
    const int lane = int(threadIdx.x) % 32, q = lane / 4, r = lane % 4;
    NAS_UNROLL for (int i = 0; i < 4 * kStrip; ++i) {
      const int tile = group * kStrip + i / 4;
      if (tile >= tiles_) continue;
      const int row = tile / across_ * kRows + q + i % 4 / 2 * 8;
      const int column = tile % across_ * kColumns + 2 * r + i % 2;
      if (row < inputs_ && column < outputs_) f(i, to_[row * pitch_ + column]);
    }
  }

  int inputs_, outputs_, pitch_;
  float* to_;
  bool begun_;
  int across_, tiles_, groups_, slices_;
  Entries sum_[kStrip] = {};
};

// The one or the other, by how exact images are.
template <typename T>
using MatrixGradient = std::conditional_t<kOnTensorCores<T>, TensorMatrixGradient,
                                          ScalarMatrixGradient<Sum<T>>>;

}  // namespace nas::cuda
