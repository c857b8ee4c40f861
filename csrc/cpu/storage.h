// Numbers as they lie in memory.
//
// All arithmetic is on Vec<T>. What goes far and comes back later, planes over the whole batch, is
// stored as S: T itself or, for float, bfloat16, of which there are half as many bytes to move.
// Sixteen<S> are sixteen of them. Where S is T, that is Vec<T> and nothing here does anything.

#pragma once

#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../cell.h"
#include "vector.h"

namespace nas::NAS_ISA {

typedef uint16_t Short __attribute__((vector_size(NAS_VECTOR_BYTES / 2), may_alias));
typedef uint32_t Word __attribute__((vector_size(NAS_VECTOR_BYTES), may_alias));

struct Halves {
  Short part[Vec<float>::kParts];
};

// Does what is stored lose bits?
template <typename S, typename T> constexpr bool kRounded = !std::is_same_v<S, T>;

template <typename S> struct SixteenOf { using type = Vec<S>; };
template <> struct SixteenOf<bfloat16> { using type = Halves; };
template <typename S> using Sixteen = typename SixteenOf<S>::type;

template <typename T> NAS_INLINE const Vec<T>& widen(const Vec<T>& x) { return x; }
NAS_INLINE Vec<float> widen(const Halves& x) {
  Vec<float> r;
  NAS_UNROLL for (int i = 0; i < Vec<float>::kParts; ++i) {
    r.part[i] = (Register<float>::type)(__builtin_convertvector(x.part[i], Word) << 16);
  }
  return r;
}
NAS_INLINE float widen(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
NAS_INLINE float widen(float x) { return x; }
NAS_INLINE double widen(double x) { return x; }

// Rounds to the nearest number, of two equally near ones to the even; NaN stays NaN.
template <typename T> NAS_INLINE void put(Vec<T>& to, const Vec<T>& x) { to = x; }
NAS_INLINE void put(Halves& to, const Vec<float>& x) {
  NAS_UNROLL for (int i = 0; i < Vec<float>::kParts; ++i) {
    const Word bits = (Word)x.part[i];
    const Word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Word kept = x.part[i] == x.part[i] ? rounded : Word{} + 0x7fc0;
    to.part[i] = __builtin_convertvector(kept, Short);
  }
}
// The same, giving back what memory then holds.
template <typename M, typename T> NAS_INLINE Vec<T> keep(M& to, const Vec<T>& x) {
  put(to, x);
  if constexpr (std::is_same_v<M, Vec<T>>) return x;
  return widen(to);
}

// To memory past the caches: its lines are not read first, and drive no others out. For what is read
// again much later; a thread must have called finish_streaming() before others look.
#if defined(__SSE2__)
NAS_INLINE void stream_piece(__m128i* to, __m128i x) { _mm_stream_si128(to, x); }
#if defined(__AVX__)
NAS_INLINE void stream_piece(__m256i* to, __m256i x) { _mm256_stream_si256(to, x); }
#endif
#if defined(__AVX512F__)
NAS_INLINE void stream_piece(__m512i* to, __m512i x) { _mm512_stream_si512(to, x); }
#endif
template <typename Piece, typename M> NAS_INLINE void stream_pieces(M* to, const M& x) {
  Piece pieces[sizeof(M) / sizeof(Piece)];
  std::memcpy(pieces, &x, sizeof(M));
  auto* place = reinterpret_cast<Piece*>(to);
  for (const Piece& piece : pieces) stream_piece(place++, piece);
}
#endif
template <typename M> NAS_INLINE void stream(M* to, const M& x) {
#if defined(__AVX512F__)
  stream_pieces<std::conditional_t<sizeof(M) % 64 == 0, __m512i, __m256i>>(to, x);
#elif defined(__AVX__)
  stream_pieces<__m256i>(to, x);
#elif defined(__SSE2__)
  stream_pieces<__m128i>(to, x);
#else
  *to = x;
#endif
}
NAS_INLINE void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The first `count` of up to sixteen numbers in memory; the others are zero.
template <typename T> NAS_INLINE Vec<T> load_channels(const T* from, int64_t count) {
  if (count >= kLanes) return Vec<T>::load(from);
  alignas(64) T lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return Vec<T>::load(lanes);
}
NAS_INLINE Halves load_halves(const bfloat16* from, int64_t count) {
  Halves r = {};
  std::memcpy(&r, from, (count >= kLanes ? kLanes : count) * sizeof(bfloat16));
  return r;
}
NAS_INLINE Vec<float> load_channels(const bfloat16* from, int64_t count) {
  return widen(count >= kLanes ? load_halves(from, kLanes) : load_halves(from, count));
}
template <typename T> NAS_INLINE void store_channels(const Vec<T>& x, T* to, int64_t count) {
  if (count >= kLanes) return x.store(to);
  alignas(64) T lanes[kLanes];
  x.store(lanes);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}
NAS_INLINE void store_channels(const Halves& x, bfloat16* to, int64_t count) {
  if (count >= kLanes) {
    std::memcpy(to, &x, sizeof(x));
  } else {
    std::memcpy(to, &x, count * sizeof(bfloat16));
  }
}
NAS_INLINE void store_channels(const Vec<float>& x, bfloat16* to, int64_t count) {
  Halves rounded;
  put(rounded, x);
  store_channels(rounded, to, count);
}

// The same as they lie, for a copy.
template <typename T> NAS_INLINE Vec<T> load_stored(const T* from, int64_t count) {
  return load_channels(from, count);
}
NAS_INLINE Halves load_stored(const bfloat16* from, int64_t count) {
  return count >= kLanes ? load_halves(from, kLanes) : load_halves(from, count);
}

// Has make(row, plane) compute `width` Vecs of each group, which then are at to[group * plane]: put
// there at once or, where memory holds other numbers, by way of `spare` [group][width].
template <typename T, typename M, typename Make>
NAS_INLINE void write_rows(M* to, int64_t plane, int64_t groups, int64_t width, Vec<T>* spare,
                           Make&& make) {
  if constexpr (std::is_same_v<M, Vec<T>>) {
    make(to, plane);
  } else {
    make(spare, width);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t x = 0; x < width; ++x) put(to[g * plane + x], spare[g * width + x]);
    }
  }
}

// `count` Vecs as memory of S holds them: where they are, if it holds the same, else in `spare`.
template <typename S, typename T>
NAS_INLINE const Sixteen<S>* rounded(const Vec<T>* from, int64_t count, Sixteen<S>* spare) {
  if constexpr (std::is_same_v<S, T>) {
    return from;
  } else {
    for (int64_t i = 0; i < count; ++i) put(spare[i], from[i]);
    return spare;
  }
}

}  // namespace nas::NAS_ISA
