// 3x3 max and average pooling of one plane, padding 1; the average counts real pixels only.

#pragma once

#include "storage.h"

namespace nas::NAS_ISA {

struct Window {  // rows or columns of the input that an output sees
  int64_t begin, end;

  static NAS_INLINE Window of(int64_t output, int64_t stride, int64_t size) {
    const int64_t first = output * stride - 1, last = output * stride + 2;
    return {first < 0 ? 0 : first, last > size ? size : last};
  }
  NAS_INLINE int64_t count() const { return end - begin; }
};

template <typename T, typename M> bool all_finite(const M* row, int64_t width) {
  Vec<T> total = Vec<T>::zero();
  for (int64_t x = 0; x < width; ++x) total += widen(row[x]) - widen(row[x]);
  return sum(total, 0, kLanes) == 0;
}

// One row of both pools. Columns are pooled first, into `largest` and `total` [width]. Without `Nan`,
// says whether all sums were finite: only then is it right.
template <bool Nan, typename M, typename T>
bool pool_row(const M* plane, int64_t height, int64_t width, int64_t stride, int64_t y,
              Vec<T>* largest, Vec<T>* total, M* max_row, M* average_row) {
  const Window rows = Window::of(y, stride, height);
  for (int64_t x = 0; x < width; ++x) {
    Vec<T> high = widen(plane[rows.begin * width + x]), add = high;
    for (int64_t r = rows.begin + 1; r < rows.end; ++r) {
      const Vec<T> value = widen(plane[r * width + x]);
      high = maximum<Nan>(high, value);
      add += value;
    }
    largest[x] = high;
    total[x] = add;
  }
  const int64_t out_width = (width + stride - 1) / stride;
  Vec<T> none = Vec<T>::zero();
  for (int64_t x = 0; x < out_width; ++x) {
    const Window columns = Window::of(x, stride, width);
    Vec<T> high = largest[columns.begin], add = total[columns.begin];
    for (int64_t c = columns.begin + 1; c < columns.end; ++c) {
      high = maximum<Nan>(high, largest[c]);
      add += total[c];
    }
    if constexpr (!Nan) none += add - add;
    put(max_row[x], high);
    put(average_row[x], add * Vec<T>::splat(T(1) / T(rows.count() * columns.count())));
  }
  return sum(none, 0, kLanes) == 0;
}
template <typename M, typename T>
void pool_row(const M* plane, int64_t height, int64_t width, int64_t stride, int64_t y,
              Vec<T>* largest, Vec<T>* total, M* max_row, M* average_row) {
  const auto pool = [&](auto nan) NAS_INLINED {
    return pool_row<nan>(plane, height, width, stride, y, largest, total, max_row, average_row);
  };
  if (!pool(std::false_type{})) pool(std::true_type{});
}

// Adds to `input_gradient` what one row of output gradients sends back; the maximum goes to the
// first of equal pixels. With `Nan` some maximum is not finite.
template <bool Nan, typename M, typename T>
void pool_row_gradient(const M* plane, int64_t height, int64_t width, int64_t stride, int64_t y,
                       const M* max_row, const Vec<T>* max_gradient,
                       const Vec<T>* average_gradient, Vec<T>* input_gradient) {
  const Window rows = Window::of(y, stride, height);
  const int64_t out_width = (width + stride - 1) / stride;
  for (int64_t x = 0; x < out_width; ++x) {
    const Window columns = Window::of(x, stride, width);
    const Vec<T> high = widen(max_row[x]);
    Vec<T> left = max_gradient[x];
    if constexpr (Nan) {
      Vec<T> of_nan = claim_nan(left, high);
      for (int64_t r = rows.end - 1; r >= rows.begin; --r) {
        for (int64_t c = columns.end - 1; c >= columns.begin; --c) {
          input_gradient[r * width + c] += claim<true>(of_nan, widen(plane[r * width + c]), high);
        }
      }
    }
    const Vec<T> average =
        average_gradient[x] * Vec<T>::splat(T(1) / T(rows.count() * columns.count()));
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      for (int64_t c = columns.begin; c < columns.end; ++c) {
        const int64_t at = r * width + c;
        input_gradient[at] += average + claim<Nan>(left, widen(plane[at]), high);
      }
    }
  }
}

template <typename M, typename T>
void pool_row_gradient(const M* plane, int64_t height, int64_t width, int64_t stride, int64_t y,
                       const M* max_row, const Vec<T>* max_gradient,
                       const Vec<T>* average_gradient, Vec<T>* input_gradient) {
  const auto give = [&](auto nan) NAS_INLINED {
    pool_row_gradient<nan>(plane, height, width, stride, y, max_row, max_gradient,
                           average_gradient, input_gradient);
  };
  if (all_finite<T>(max_row, (width + stride - 1) / stride)) return give(std::false_type{});
  give(std::true_type{});
}

}  // namespace nas::NAS_ISA
