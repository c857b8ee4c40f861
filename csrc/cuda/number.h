// Numbers as they are stored and as they are computed with, several at a time where they may be.

#pragma once

#include <cstring>
#include <type_traits>

#include "device.h"

namespace nas::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
// Single precision, but for the factors of products of matrices.
struct Tf32 {
  float value;
};

// What a stored number is computed and accumulated in; parameters are stored in it, too.
template <typename T>
struct SumOf {
  using type = T;
};
template <>
struct SumOf<BFloat16> {
  using type = float;
};
template <>
struct SumOf<Half> {
  using type = float;
};
template <>
struct SumOf<Tf32> {
  using type = float;
};
template <typename T>
using Sum = typename SumOf<T>::type;

NAS_DEVICE double widen(double x) { return x; }
NAS_DEVICE float widen(float x) { return x; }
NAS_DEVICE float widen(Tf32 x) { return x.value; }

#if defined(__CUDA_ARCH__)

NAS_DEVICE float widen(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
NAS_DEVICE float widen(Half x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
NAS_DEVICE void narrow(float x, BFloat16& to) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}
NAS_DEVICE void narrow(float x, Half& to) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}

#else

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
inline void narrow(float x, BFloat16& to) {
  const uint32_t bits = bits_of(x);
  to.bits = x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // as a float of the same bits it is 2^112 times too small
  return float_of(sign | bits_of(float_of(rest << 13) * 5.192296858534828e33f));
}
inline void narrow(float x, Half& to) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  uint32_t half;
  if (rest > 0x7f800000) {
    half = 0x7fff;
  } else if (rest >= 0x47800000) {
    half = 0x7c00;
  } else if (rest < 0x38800000) {  // below 2^-14: adding 1/2 rounds at 2^-24, the last place
    half = bits_of(float_of(rest) + 0.5f) - 0x3f000000;
  } else {
    half = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  to.bits = uint16_t(sign | half);
}

#endif

NAS_DEVICE void narrow(double x, double& to) { to = x; }
NAS_DEVICE void narrow(float x, float& to) { to = x; }
NAS_DEVICE void narrow(float x, Tf32& to) { to.value = x; }

// Whether tensor cores multiply matrices: wherever numbers need not be exact to single precision.
template <typename T>
constexpr bool kOnTensorCores = !std::is_same_v<T, Sum<T>>;

template <typename T>
NAS_DEVICE Sum<T> load(const T* at) {
  NAS_TOUCHES(at, sizeof(T));
  return widen(*at);
}
template <typename T>
NAS_DEVICE void store(T* at, Sum<T> x) {
  NAS_TOUCHES(at, sizeof(T));
  narrow(x, *at);
}

// `V` numbers that lie together, read or written at once.
template <typename T, int V>
struct alignas(sizeof(T) * V > 16 ? 16 : sizeof(T) * V) Pack {
  T value[V];
};
// As many as 16 bytes hold.
template <typename T>
constexpr int kWide = int(16 / sizeof(T));

template <int V, typename T>
NAS_DEVICE void load(const T* at, Sum<T> (&to)[V]) {
  NAS_TOUCHES(at, alignof(Pack<T, V>));
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(at);
  NAS_UNROLL for (int v = 0; v < V; ++v) to[v] = widen(pack.value[v]);
}
template <int V, typename T>
NAS_DEVICE void store(T* at, const Sum<T> (&x)[V]) {
  NAS_TOUCHES(at, alignof(Pack<T, V>));
  Pack<T, V> pack;
  NAS_UNROLL for (int v = 0; v < V; ++v) narrow(x[v], pack.value[v]);
  *reinterpret_cast<Pack<T, V>*>(at) = pack;
}
// Four numbers of two bytes as they are stored, and eight that are to be stored.
template <typename T>
NAS_DEVICE uint64_t packed(const float (&x)[4]) {
  Pack<T, 4> pack;
  NAS_UNROLL for (int j = 0; j < 4; ++j) narrow(x[j], pack.value[j]);
  uint64_t bits;
  static_assert(sizeof(bits) == sizeof(pack));
  memcpy(&bits, &pack, sizeof(bits));
  return bits;
}
template <typename T>
NAS_DEVICE void store_packed(T* at, const uint64_t (&bits)[2]) {
  Pack<T, 8> pack;
  static_assert(sizeof(bits) == sizeof(pack));
  NAS_TOUCHES(at, sizeof(bits));
  memcpy(&pack, &bits, sizeof(bits));
  *reinterpret_cast<Pack<T, 8>*>(at) = pack;
}

// NaN stays NaN, as in eager PyTorch.
template <typename A>
NAS_DEVICE A relu(A x) {
  return x <= A(0) ? A(0) : x;
}
// The gradient before a rectification that gave, or was given, x.
template <typename A>
NAS_DEVICE A relu_gradient(A gradient, A x) {
  return x <= A(0) ? A(0) : gradient;
}
// Whether x takes the place of the largest so far.
template <typename A>
NAS_DEVICE bool exceeds(A x, A largest) {
  return x > largest || (x != x && largest == largest);
}

}  // namespace nas::cuda
