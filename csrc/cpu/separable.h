// A depthwise and a pointwise convolution in one. With several images in the lanes (layout.h) a pixel
// of the one is all that a pixel of the other sees: it stays in registers. For 4 and 8 channels.

#pragma once

#include "pointwise.h"

namespace nas::NAS_ISA {

// A row of outputs; see depthwise_row() and lane_product_row(). What the depthwise part gives goes to
// `between`, unless that is null.
template <int K, int D, int S, int Channels, typename T>
void separable_row(const Vec<T>* in, int64_t pitch, const Vec<T>* taps, const Vec<T>* weights,
                   Vec<T>* between, Vec<T>* out, int64_t width) {
  for_columns<kPixels>(0, width, [&](auto block, int64_t x) NAS_INLINED {
    constexpr int count = decltype(block)::value;
    Vec<T> sum[count] = {};
    depthwise_block<K, D, S>(in + x * S, pitch, taps, sum);
    if (between) {
      NAS_UNROLL for (int i = 0; i < count; ++i) between[x + i] = sum[i];
    }
    lane_product_block<Channels, count>(sum, weights, out + x,
                                        std::make_index_sequence<Channels>{});
  });
}

template <typename T>
using SeparableRow = void (*)(const Vec<T>*, int64_t, const Vec<T>*, const Vec<T>*, Vec<T>*, Vec<T>*,
                              int64_t);

// The one for a convolution, or null where there is none.
template <int Channels, typename T>
SeparableRow<T> choose_separable(const Depthwise<T>& depthwise) {
  const auto of_stride = [&](auto k, auto d) -> SeparableRow<T> {
    if (depthwise.stride == 1) return separable_row<k, d, 1, Channels, T>;
    return separable_row<k, d, 2, Channels, T>;
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 3> three;
  constexpr std::integral_constant<int, 5> five;
  if (depthwise.size == 3) {
    return depthwise.dilation == 1 ? of_stride(three, one) : of_stride(three, two);
  }
  return depthwise.dilation == 1 ? of_stride(five, one) : of_stride(five, two);
}
template <typename T>
SeparableRow<T> choose_separable(const Depthwise<T>& depthwise, int64_t channels) {
  if (channels == 4) return choose_separable<4>(depthwise);
  return channels == 8 ? choose_separable<8>(depthwise) : nullptr;
}

}  // namespace nas::NAS_ISA
