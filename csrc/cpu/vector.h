// Sixteen numbers side by side, in as many registers as the instruction set needs.
//
// Everything in csrc/cpu computes on Vec<T>. NAS_VECTOR_BYTES, the width of one register, is set by
// the file that includes this (cell_avx512.cpp and its siblings); the code is the same for all.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#define NAS_INLINE inline __attribute__((always_inline))
// For a lambda, after its parameters: one that is called, and not inlined, loads all it needs anew.
#define NAS_INLINED __attribute__((always_inline))
#define NAS_UNROLL _Pragma("GCC unroll 32")

namespace nas::NAS_ISA {

constexpr int kLanes = 16;
constexpr bool kManyRegisters = NAS_VECTOR_BYTES == 64;  // 32 vector registers instead of 16
// Pixels whose accumulators fit into the registers beside weights and inputs.
constexpr int kPixels = kManyRegisters ? 8 : NAS_VECTOR_BYTES == 32 ? 4 : 2;

// Calls f with `count`, from 1 to Most, as a constant, or with Most if there are more: a loop over so
// many is unrolled and what it adds up stays in registers.
template <int Most, typename F>
NAS_INLINE void with_most(int count, F&& f) {
  if constexpr (Most > 1) {
    if (count < Most) return with_most<Most - 1>(count, f);
  }
  f(std::integral_constant<int, Most>{});
}

// Loops that wait for memory ask for the pixel `kAhead` later.
constexpr int64_t kAhead = 12;
template <typename T> NAS_INLINE void prefetch(const T* at) { __builtin_prefetch(at); }

template <typename T> struct Register;
template <> struct Register<float> {
  typedef float type __attribute__((vector_size(NAS_VECTOR_BYTES), may_alias));
  typedef float loose __attribute__((vector_size(NAS_VECTOR_BYTES), may_alias, aligned(4)));
};
template <> struct Register<double> {
  typedef double type __attribute__((vector_size(NAS_VECTOR_BYTES), may_alias));
  typedef double loose __attribute__((vector_size(NAS_VECTOR_BYTES), may_alias, aligned(8)));
};

template <typename T>
struct Vec {
  static constexpr int kWidth = NAS_VECTOR_BYTES / sizeof(T);  // numbers in a register
  static constexpr int kParts = kLanes / kWidth;
  typename Register<T>::type part[kParts];

  static NAS_INLINE Vec splat(T value) {
    Vec r;
    NAS_UNROLL for (int i = 0; i < kParts; ++i) r.part[i] = value - typename Register<T>::type{};
    return r;
  }
  static NAS_INLINE Vec zero() {
    Vec r;
    NAS_UNROLL for (int i = 0; i < kParts; ++i) r.part[i] = typename Register<T>::type{};
    return r;
  }
  // `from` needs the alignment of a T only.
  static NAS_INLINE Vec load(const T* from) {
    Vec r;
    NAS_UNROLL for (int i = 0; i < kParts; ++i) {
      r.part[i] = *reinterpret_cast<const typename Register<T>::loose*>(from + i * kWidth);
    }
    return r;
  }
  NAS_INLINE void store(T* to) const {
    NAS_UNROLL for (int i = 0; i < kParts; ++i) {
      *reinterpret_cast<typename Register<T>::loose*>(to + i * kWidth) = part[i];
    }
  }
};

#define NAS_OPERATOR(symbol)                                                              \
  template <typename T> NAS_INLINE Vec<T> operator symbol(Vec<T> a, const Vec<T>& b) {    \
    NAS_UNROLL for (int i = 0; i < Vec<T>::kParts; ++i) a.part[i] = a.part[i] symbol b.part[i]; \
    return a;                                                                             \
  }
NAS_OPERATOR(+)
NAS_OPERATOR(-)
NAS_OPERATOR(*)
#undef NAS_OPERATOR

template <typename T> NAS_INLINE void operator+=(Vec<T>& a, const Vec<T>& b) { a = a + b; }

// max(x, 0) as torch has it: NaN stays NaN.
template <typename T> NAS_INLINE Vec<T> relu(Vec<T> x) {
  NAS_UNROLL for (int i = 0; i < Vec<T>::kParts; ++i) {
    x.part[i] = x.part[i] < 0 ? typename Register<T>::type{} : x.part[i];
  }
  return x;
}

// Gradient through relu, given its input or output: none where that is not positive.
template <typename T> NAS_INLINE Vec<T> relu_gradient(Vec<T> gradient, const Vec<T>& at) {
  NAS_UNROLL for (int i = 0; i < Vec<T>::kParts; ++i) {
    gradient.part[i] = at.part[i] <= 0 ? typename Register<T>::type{} : gradient.part[i];
  }
  return gradient;
}

// `x` where `mask` is not zero, else `other`. With zeros for `other` this is no product: NaN and
// infinity go, too.
template <typename T>
NAS_INLINE Vec<T> select(const Vec<T>& mask, Vec<T> x, const Vec<T>& other = Vec<T>::zero()) {
  NAS_UNROLL for (int i = 0; i < Vec<T>::kParts; ++i) {
    x.part[i] = mask.part[i] != 0 ? x.part[i] : other.part[i];
  }
  return x;
}

// Zeros in the place of NaN and infinity.
template <typename T> NAS_INLINE Vec<T> finite_or_zero(Vec<T> x) {
  NAS_UNROLL for (int i = 0; i < Vec<T>::kParts; ++i) {
    const auto none = x.part[i] - x.part[i];
    x.part[i] = none == 0 ? x.part[i] : typename Register<T>::type{};
  }
  return x;
}

// The larger one; NaN wins, and of equal ones `a` stays. Without `Nan`, for numbers that are none.
template <bool Nan, typename T> NAS_INLINE Vec<T> maximum(Vec<T> a, const Vec<T>& b) {
  NAS_UNROLL for (int i = 0; i < Vec<T>::kParts; ++i) {
    if constexpr (Nan) {
      a.part[i] = (b.part[i] > a.part[i]) | (b.part[i] != b.part[i]) ? b.part[i] : a.part[i];
    } else {
      a.part[i] = a.part[i] < b.part[i] ? b.part[i] : a.part[i];
    }
  }
  return a;
}

// Takes from `gradient` the lanes where value is the maximum and zeroes them there, so that the
// first of equal values takes all (NaN is equal to NaN here). Without `Nan`, where there is none.
template <bool Nan, typename T>
NAS_INLINE Vec<T> claim(Vec<T>& gradient, const Vec<T>& value, const Vec<T>& maximum) {
  using R = typename Register<T>::type;
  Vec<T> taken;
  NAS_UNROLL for (int i = 0; i < Vec<T>::kParts; ++i) {
    const R v = value.part[i], m = maximum.part[i];
    auto hit = v == m;
    if constexpr (Nan) hit |= v != v;
    taken.part[i] = hit ? gradient.part[i] : R{};
    gradient.part[i] = hit ? R{} : gradient.part[i];
  }
  return taken;
}

// Takes from `gradient` the lanes where the maximum is NaN. PyTorch sends these to the last NaN of a
// window: claim() finds it from the window's end.
template <typename T> NAS_INLINE Vec<T> claim_nan(Vec<T>& gradient, const Vec<T>& maximum) {
  using R = typename Register<T>::type;
  Vec<T> taken;
  NAS_UNROLL for (int i = 0; i < Vec<T>::kParts; ++i) {
    const auto hit = maximum.part[i] != maximum.part[i];
    taken.part[i] = hit ? gradient.part[i] : R{};
    gradient.part[i] = hit ? R{} : gradient.part[i];
  }
  return taken;
}

template <typename T> NAS_INLINE T sum(const Vec<T>& x, int first, int count) {
  T lanes[kLanes];
  x.store(lanes);
  T total = 0;
  for (int i = first; i < first + count; ++i) total += lanes[i];
  return total;
}

// Lane `Channel` of each group of `Group` lanes, spread over the group.
template <int Group, int Channel, typename T, std::size_t... Lane>
NAS_INLINE Vec<T> spread_lanes(const Vec<T>& x, std::index_sequence<Lane...>) {
  constexpr int width = Vec<T>::kWidth;
  Vec<T> r;
  if constexpr (width >= Group) {
    NAS_UNROLL for (int i = 0; i < Vec<T>::kParts; ++i) {
      r.part[i] = __builtin_shufflevector(x.part[i], x.part[i],
                                          (int(Lane) / Group * Group + Channel)...);
    }
  } else {
    NAS_UNROLL for (int i = 0; i < Vec<T>::kParts; ++i) {
      const int from = i * width / Group * Group + Channel;
      const auto& source = x.part[from / width];
      r.part[i] = __builtin_shufflevector(source, source, (int(Lane) * 0 + Channel % width)...);
    }
  }
  return r;
}
template <int Group, int Channel, typename T> NAS_INLINE Vec<T> spread(const Vec<T>& x) {
  return spread_lanes<Group, Channel>(x, std::make_index_sequence<Vec<T>::kWidth>{});
}

}  // namespace nas::NAS_ISA
