// 3x3 max and average pooling of one plane, padding 1; the average counts real pixels only.

#pragma once

#include "vector.h"

namespace nas::NAS_ISA {

struct Window {  // rows or columns of the input that an output sees
  int64_t begin, end;

  static NAS_INLINE Window of(int64_t output, int64_t stride, int64_t size) {
    const int64_t first = output * stride - 1, last = output * stride + 2;
    return {first < 0 ? 0 : first, last > size ? size : last};
  }
  NAS_INLINE int64_t count() const { return end - begin; }
};

// One row of both pools. Columns are pooled first, into `largest` and `total` [width].
template <typename T>
void pool_row(const Vec<T>* plane, int64_t height, int64_t width, int64_t stride, int64_t y,
              Vec<T>* largest, Vec<T>* total, Vec<T>* max_row, Vec<T>* average_row) {
  const Window rows = Window::of(y, stride, height);
  for (int64_t x = 0; x < width; ++x) {
    Vec<T> high = plane[rows.begin * width + x], add = high;
    for (int64_t r = rows.begin + 1; r < rows.end; ++r) {
      high = maximum(high, plane[r * width + x]);
      add += plane[r * width + x];
    }
    largest[x] = high;
    total[x] = add;
  }
  const int64_t out_width = (width + stride - 1) / stride;
  for (int64_t x = 0; x < out_width; ++x) {
    const Window columns = Window::of(x, stride, width);
    Vec<T> high = largest[columns.begin], add = total[columns.begin];
    for (int64_t c = columns.begin + 1; c < columns.end; ++c) {
      high = maximum(high, largest[c]);
      add += total[c];
    }
    max_row[x] = high;
    average_row[x] = add * Vec<T>::splat(T(1) / T(rows.count() * columns.count()));
  }
}

// Adds to `input_gradient` what one row of output gradients sends back; the maximum goes to the
// first of equal pixels.
template <typename T>
void pool_row_gradient(const Vec<T>* plane, int64_t height, int64_t width, int64_t stride,
                       int64_t y, const Vec<T>* max_row, const Vec<T>* max_gradient,
                       const Vec<T>* average_gradient, Vec<T>* input_gradient) {
  const Window rows = Window::of(y, stride, height);
  const int64_t out_width = (width + stride - 1) / stride;
  const bool finite = all_finite(max_row, out_width);
  for (int64_t x = 0; x < out_width; ++x) {
    const Window columns = Window::of(x, stride, width);
    const Vec<T> high = max_row[x];
    Vec<T> left = max_gradient[x];
    if (!finite) {
      Vec<T> of_nan = claim_nan(left, high);
      for (int64_t r = rows.end - 1; r >= rows.begin; --r) {
        for (int64_t c = columns.end - 1; c >= columns.begin; --c) {
          input_gradient[r * width + c] += claim(of_nan, plane[r * width + c], high);
        }
      }
    }
    const Vec<T> average =
        average_gradient[x] * Vec<T>::splat(T(1) / T(rows.count() * columns.count()));
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      for (int64_t c = columns.begin; c < columns.end; ++c) {
        const int64_t at = r * width + c;
        input_gradient[at] += average + claim(left, plane[at], high);
      }
    }
  }
}

}  // namespace nas::NAS_ISA
