// Gradients of matrices: sums over pixels of outer products.

#pragma once

#include "tile.cuh"

namespace nas::cuda {

constexpr int kOuter = kThreads * 16;  // numbers of scratch that a matrix gradient ends with

// sum over rows of left[row][i] right[row][o], for a block's rows. A thread keeps 4 x 4 entries in
// registers; where there are fewer entries than that, threads share the rows; where there are more,
// the sums are in the block's own part of global memory.
template <typename A>
class MatrixGradient {
 public:
  NAS_DEVICE MatrixGradient(int inputs, int outputs, int pitch, A* to)
      : inputs_(inputs), outputs_(outputs), pitch_(pitch), to_(to),
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
    }
    begun_ = true;
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
        to = column_sum(scratch + (i * 4 + j) * slices_ * items_, slices_, items_, item);
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
  int across_, items_, slices_;
  bool begun_ = false;
  A sum_[4][4] = {};
};

}  // namespace nas::cuda
