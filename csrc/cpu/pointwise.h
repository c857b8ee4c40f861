// Pointwise (1x1) convolutions: products of a row of pixels with a small matrix.
//
// Blocked by hand, since at 4 to 64 channels a BLAS call spends its time around the product. Two
// layouts of the lanes (see layout.h): sixteen channels of one pixel, where an input channel is a
// scalar spread over the outputs' lanes; or 16 / Group images of Group channels each, where it is
// spread within each image's lanes.

#pragma once

#include <type_traits>

#include "depthwise.h"
#include "vector.h"

namespace nas::NAS_ISA {

// Where scalar channels lie: channel i of pixel x is at[x * pixel + i / 16 * group + i % 16].
template <typename T>
struct Channels {
  const T* at;
  int64_t pixel, group;
  int64_t count;

  NAS_INLINE const T* of(int64_t x, int64_t first) const {
    return at + x * pixel + first / kLanes * group + first % kLanes;
  }
};

// Where Vecs of channels lie: group `o` of pixel x is at[o * group + x * pixel].
template <typename M>
struct Groups {
  M* at;
  int64_t group, pixel = 1;

  NAS_INLINE M* of(int64_t o) const { return at + o * group; }
};

// Channels of a plane set [group][pixel] of Vec.
template <typename T>
Channels<T> plane_channels(const Vec<T>* planes, int64_t plane, int64_t channels) {
  return {reinterpret_cast<const T*>(planes), kLanes, plane * kLanes, channels};
}

template <int Count, int Outs, typename T>
NAS_INLINE void product_block(const Channels<T>& in, int64_t x, const Vec<T>* weights,
                              const Groups<Vec<T>>& out, int64_t group) {
  Vec<T> sum[Outs][Count];
  NAS_UNROLL for (int o = 0; o < Outs; ++o) {
    NAS_UNROLL for (int p = 0; p < Count; ++p) sum[o][p] = Vec<T>::zero();
  }
  for (int64_t first = 0; first < in.count; first += kLanes) {
    const T* from = in.of(x, first);
    const int64_t last = in.count - first < kLanes ? in.count - first : kLanes;
    for (int64_t i = 0; i < last; ++i) {
      const Vec<T>* row = weights + first + i;
      NAS_UNROLL for (int p = 0; p < Count; ++p) {
        const Vec<T> value = Vec<T>::splat(from[p * in.pixel + i]);
        NAS_UNROLL for (int o = 0; o < Outs; ++o) sum[o][p] += value * row[o * in.count];
      }
    }
  }
  NAS_UNROLL for (int o = 0; o < Outs; ++o) {
    Vec<T>* to = out.of(group + o) + x * out.pixel;
    NAS_UNROLL for (int p = 0; p < Count; ++p) to[p * out.pixel] = sum[o][p];
  }
}

// `Outs` groups of outputs at a time, so often as they are there; returns the first that is left.
template <int Outs, int Pixels, typename T>
NAS_INLINE int64_t product_groups(const Channels<T>& in, const Vec<T>* weights, int64_t o,
                                  int64_t groups_out, const Groups<Vec<T>>& out,
                                  int64_t width) {
  for (; o + Outs <= groups_out; o += Outs) {
    for_columns<Pixels>(0, width, [&](auto block, int64_t x) NAS_INLINED {
      constexpr int count = decltype(block)::value;
      product_block<count, Outs>(in, x, weights + o * in.count, out, o);
    });
  }
  return o;
}

// out(o, x) = sum over i of in(x, i) * weights[o][i]; weights [group of outputs][input] of Vec.
template <typename T>
void product_row(const Channels<T>& in, const Vec<T>* weights, int64_t groups_out,
                 const Groups<Vec<T>>& out, int64_t width) {
  int64_t o = 0;
  if constexpr (kManyRegisters) {  // the more outputs share an input, the fewer loads
    o = product_groups<4, kPixels / 2>(in, weights, o, groups_out, out, width);
    o = product_groups<2, kPixels>(in, weights, o, groups_out, out, width);
  }
  product_groups<1, kPixels>(in, weights, o, groups_out, out, width);
}

// total[o][i] += sum over x of in(x, i) * gradient(o, x)
template <typename T>
void product_weight_gradient(const Channels<T>& in, const Groups<const Vec<T>>& gradient,
                             int64_t groups_out, int64_t pixels, Vec<T>* total) {
  constexpr int kRows = kManyRegisters ? 16 : NAS_VECTOR_BYTES == 32 ? 4 : 2;
  for (int64_t o = 0; o < groups_out; ++o) {
    const Vec<T>* g = gradient.of(o);
    for (int64_t group = 0; group < in.count; group += kLanes) {
      const int64_t last = in.count - group < kLanes ? in.count - group : kLanes;
      for_columns<kRows>(0, last, [&](auto block, int64_t i) NAS_INLINED {
        constexpr int count = decltype(block)::value;
        const T* from = in.of(0, group) + i;
        Vec<T> sum[count];
        NAS_UNROLL for (int k = 0; k < count; ++k) sum[k] = Vec<T>::zero();
        for (int64_t x = 0; x < pixels; ++x) {
          const Vec<T> value = g[x * gradient.pixel];
          NAS_UNROLL for (int k = 0; k < count; ++k) {
            sum[k] += Vec<T>::splat(from[x * in.pixel + k]) * value;
          }
        }
        Vec<T>* to = total + o * in.count + group + i;
        NAS_UNROLL for (int k = 0; k < count; ++k) to[k] += sum[k];
      });
    }
  }
}

// The same two with 16 / Group images in the lanes; weights and total [input] of Vec.
template <int Group, int Count, typename T, std::size_t... I>
NAS_INLINE void lane_product_block(const Vec<T>* in, const Vec<T>* weights, Vec<T>* out,
                                   std::index_sequence<I...>) {
  Vec<T> sum[Count];
  NAS_UNROLL for (int p = 0; p < Count; ++p) sum[p] = Vec<T>::zero();
  NAS_UNROLL for (int p = 0; p < Count; ++p) {
    const Vec<T> value = in[p];
    ((sum[p] += spread<Group, I>(value) * weights[I]), ...);
  }
  NAS_UNROLL for (int p = 0; p < Count; ++p) out[p] = sum[p];
}

template <int Group, int Inputs, typename T>
void lane_product_row(const Vec<T>* in, const Vec<T>* weights, Vec<T>* out, int64_t width) {
  for_columns<kManyRegisters ? 8 : 2>(0, width, [&](auto block, int64_t x) NAS_INLINED {
    constexpr int count = decltype(block)::value;
    lane_product_block<Group, count>(in + x, weights, out + x,
                                     std::make_index_sequence<Inputs>{});
  });
}

template <int Group, typename T, std::size_t... I>
void lane_product_weight_gradient(const Vec<T>* in, const Vec<T>* gradient, int64_t pixels,
                                  Vec<T>* total, std::index_sequence<I...>) {
  Vec<T> even[Group] = {((void)I, Vec<T>::zero())...};
  Vec<T> odd[Group] = {((void)I, Vec<T>::zero())...};
  int64_t x = 0;
  for (; x + 2 <= pixels; x += 2) {
    const Vec<T> first = in[x], second = in[x + 1], g = gradient[x], h = gradient[x + 1];
    ((even[I] += spread<Group, I>(first) * g), ...);
    ((odd[I] += spread<Group, I>(second) * h), ...);
  }
  if (x < pixels) ((even[I] += spread<Group, I>(in[x]) * gradient[x]), ...);
  ((total[I] += even[I] + odd[I]), ...);
}

// The pointwise convolutions of the mixed operation in either layout of the lanes. They are the one
// place where lanes mix, and read no lanes that hold nothing: there NaN may lie.
template <typename T>
struct Pointwise {
  int64_t group;     // lanes of one image: 16, or a smaller power of two
  int64_t groups;    // Vecs that hold the channels of a pixel
  int64_t channels;

  int64_t inputs() const { return group == kLanes ? channels : group; }  // rows of a packed matrix
  int64_t weights() const { return groups * inputs(); }                  // Vecs

  // in, out: [group][.] of Vec, groups `in_group` and `out_group` Vecs apart.
  void row(const Vec<T>* in, int64_t in_group, const Vec<T>* weights, Vec<T>* out,
           int64_t out_group, int64_t width) const {
    with_channels([&](auto count) {
      if constexpr (count == kLanes) {
        product_row(plane_channels(in, in_group, channels), weights, groups, {out, out_group}, width);
      } else {
        constexpr int lanes = count > 4 ? 8 : count > 2 ? 4 : count;
        lane_product_row<lanes, count>(in, weights, out, width);
      }
    });
  }
  void weight_gradient(const Vec<T>* in, int64_t in_group, const Vec<T>* gradient,
                       int64_t gradient_group, int64_t pixels, Vec<T>* total) const {
    with_group([&](auto lanes) {
      if constexpr (lanes == kLanes) {
        product_weight_gradient(plane_channels(in, in_group, channels), {gradient, gradient_group},
                                groups, pixels, total);
      } else {
        lane_product_weight_gradient<lanes>(in, gradient, pixels, total,
                                            std::make_index_sequence<lanes>{});
      }
    });
  }

 private:
  template <typename F>
  void with_channels(F&& f) const {
    switch (channels) {
      case 1: return f(std::integral_constant<int, 1>{});
      case 2: return f(std::integral_constant<int, 2>{});
      case 3: return f(std::integral_constant<int, 3>{});
      case 4: return f(std::integral_constant<int, 4>{});
      case 5: return f(std::integral_constant<int, 5>{});
      case 6: return f(std::integral_constant<int, 6>{});
      case 7: return f(std::integral_constant<int, 7>{});
      case 8: return f(std::integral_constant<int, 8>{});
      default: return f(std::integral_constant<int, kLanes>{});
    }
  }
  template <typename F>
  void with_group(F&& f) const {
    switch (group) {
      case 1: return f(std::integral_constant<int, 1>{});
      case 2: return f(std::integral_constant<int, 2>{});
      case 4: return f(std::integral_constant<int, 4>{});
      case 8: return f(std::integral_constant<int, 8>{});
      default: return f(std::integral_constant<int, kLanes>{});
    }
  }
};

}  // namespace nas::NAS_ISA
