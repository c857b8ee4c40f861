// PC-DARTS' shuffle of a pixel's channels (section 3.2 of the paper): channel k * mixed + j moves to
// j * partial + k.

#pragma once

#include "storage.h"

namespace nas::NAS_ISA {

// Four rows of four numbers, turned into columns.
template <typename S>
NAS_INLINE void transpose_square(const S* const (&from)[4], S* const (&to)[4]) {
  using Number = std::conditional_t<std::is_same_v<S, bfloat16>, uint16_t, S>;
  typedef Number Four __attribute__((vector_size(4 * sizeof(S)), aligned(sizeof(S)), may_alias));
  Four row[4];
  NAS_UNROLL for (int i = 0; i < 4; ++i) row[i] = *reinterpret_cast<const Four*>(from[i]);
  const Four a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Four b = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Four c = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Four d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  *reinterpret_cast<Four*>(to[0]) = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to[1]) = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  *reinterpret_cast<Four*>(to[2]) = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to[3]) = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// The first `mixed` channels come from `lanes` [group] of Vec, `plane` numbers apart, the others from
// `rest`.
template <typename S>
NAS_INLINE void shuffle(const S* lanes, int64_t plane, const S* rest, int64_t mixed,
                        int64_t partial, S* to) {
  const auto lane = [&](int64_t j) { return lanes + j / kLanes * plane + j % kLanes; };
  if (partial == 4 && mixed % 4 == 0) {
    for (int64_t j = 0; j < mixed; j += 4) {
      const S* row = rest + j;
      S* out = to + 4 * j;
      transpose_square<S>({lane(j), row + mixed, row + 2 * mixed, row + 3 * mixed},
                          {out, out + 4, out + 8, out + 12});
    }
    return;
  }
  for (int64_t j = 0; j < mixed; ++j) {
    to[j * partial] = *lane(j);
    for (int64_t k = 1; k < partial; ++k) to[j * partial + k] = rest[k * mixed + j];
  }
}

// The way back; the first `mixed` channels of `rest` become zero.
template <typename S>
NAS_INLINE void unshuffle(const S* from, int64_t mixed, int64_t partial, S* lanes, int64_t plane,
                          S* rest) {
  const auto lane = [&](int64_t j) { return lanes + j / kLanes * plane + j % kLanes; };
  for (int64_t j = 0; j < mixed; ++j) rest[j] = S{};
  if (partial == 4 && mixed % 4 == 0) {
    for (int64_t j = 0; j < mixed; j += 4) {
      const S* row = from + 4 * j;
      S* out = rest + j;
      transpose_square<S>({row, row + 4, row + 8, row + 12},
                          {lane(j), out + mixed, out + 2 * mixed, out + 3 * mixed});
    }
    return;
  }
  for (int64_t j = 0; j < mixed; ++j) {
    *lane(j) = from[j * partial];
    for (int64_t k = 1; k < partial; ++k) rest[k * mixed + j] = from[j * partial + k];
  }
}

// The same in registers, of a pixel whose channels fill G Vecs and of which a quarter is mixed, as in
// the paper: what a network of 16, 32 and 64 channels has.
template <int G, typename T>
struct Quarters {
  using Pixel = Vec<T>[G];
  static constexpr int kMixed = 4 * G;
  static constexpr int kStart = kMixed / kLanes;  // Vecs before it hold mixed channels alone

  static NAS_INLINE void shuffle(const Pixel& plain, Pixel& shuffled) {
    permute<true>(plain, shuffled);
  }
  static NAS_INLINE void unshuffle(const Pixel& shuffled, Pixel& plain) {
    permute<false>(shuffled, plain);
  }
  // `x` with the mixed channels of an image, which `lanes` has from lane `first` on, in their place.
  static NAS_INLINE Vec<T> with_mixed(const Vec<T>& x, const Vec<T>& lanes, int64_t first) {
    if constexpr (kMixed == kLanes) return lanes;
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) {
      const __m512i lane = _mm512_add_epi32(_mm512_load_si512(kCount), _mm512_set1_epi32(int(first)));
      return of(_mm512_mask_permutexvar_ps((__m512)x.part[0], (1 << kMixed) - 1, lane,
                                           (__m512)lanes.part[0]));
    }
#endif
    alignas(64) T numbers[kLanes], others[kLanes];
    x.store(numbers);
    lanes.store(others);
    std::memcpy(numbers, others + first, kMixed * sizeof(T));
    return Vec<T>::load(numbers);
  }
  // The mixed channels, a pixel's first ones, to where a plane has them.
  template <typename S>
  static NAS_INLINE void store_mixed(const Vec<T>& x, S* to) {
    Sixteen<S> stored;
    put(stored, x);
    std::memcpy(to, &stored, kMixed * sizeof(S));
  }

 private:
  alignas(64) static constexpr int32_t kCount[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                         8, 9, 10, 11, 12, 13, 14, 15};

#if defined(__AVX512F__)
  static NAS_INLINE Vec<T> of(__m512 x) { return {{(typename Register<T>::type)x}}; }
#endif

  static constexpr int source(bool shuffles, int c) {
    return shuffles ? c % 4 * kMixed + c / 4 : c % kMixed * 4 + c / kMixed;
  }
  // Of each lane of the result: its place in the Vec that it comes from, and which come from a Vec.
  struct Places {
    alignas(64) int32_t lane[G][kLanes] = {};
    uint16_t from[G][G] = {};

    constexpr explicit Places(bool shuffles) {
      for (int c = 0; c < G * kLanes; ++c) {
        const int at = source(shuffles, c);
        lane[c / kLanes][c % kLanes] = at % kLanes;
        from[c / kLanes][at / kLanes] |= uint16_t(1 << c % kLanes);
      }
    }
  };

  template <bool Shuffles>
  static NAS_INLINE void permute(const Pixel& x, Pixel& to) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) {
      static constexpr Places places(Shuffles);
      NAS_UNROLL for (int v = 0; v < G; ++v) {
        const __m512i lane = _mm512_load_si512(places.lane[v]);
        __m512 y = _mm512_permutexvar_ps(lane, (__m512)x[0].part[0]);
        NAS_UNROLL for (int s = 1; s < G; ++s) {
          y = _mm512_mask_permutexvar_ps(y, places.from[v][s], lane, (__m512)x[s].part[0]);
        }
        to[v] = of(y);
      }
      return;
    }
#endif
    alignas(64) T from[G * kLanes], result[G * kLanes];
    NAS_UNROLL for (int v = 0; v < G; ++v) x[v].store(from + v * kLanes);
    NAS_UNROLL for (int j = 0; j < kMixed; j += 4) {
      const T* plain = Shuffles ? from + j : from + 4 * j;
      constexpr int step = Shuffles ? kMixed : 4, step_to = Shuffles ? 4 : kMixed;
      T* out = Shuffles ? result + 4 * j : result + j;
      transpose_square<T>({plain, plain + step, plain + 2 * step, plain + 3 * step},
                          {out, out + step_to, out + 2 * step_to, out + 3 * step_to});
    }
    NAS_UNROLL for (int v = 0; v < G; ++v) to[v] = Vec<T>::load(result + v * kLanes);
  }
};

}  // namespace nas::NAS_ISA
