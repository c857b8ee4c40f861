// Tensor cores: sums of products of matrices whose entries are rounded to TF32, 11 bits of each,
// and added in single precision.

#pragma once

#include "number.h"

namespace nas::cuda {

// What one instruction multiplies: kRows x kInner by kInner x kColumns.
constexpr int kRows = 16, kColumns = 8, kInner = 8;

// A lane's parts of the two factors. Lane 4 q + r has rows q and q + 8 of the left one in columns r
// and r + 4, in the order (q, r), (q + 8, r), (q, r + 4), (q + 8, r + 4), and rows r and r + 4 of
// the right one in column q (PTX ISA, mma.m16n8k8 with .tf32).
struct Left {
  float at[4];
};
struct Right {
  float at[2];
};
// Of the product, rows q and q + 8 in columns 2 r and 2 r + 1.
struct Entries {
  float at[4];
};

#if defined(__CUDA_ARCH__)

NAS_DEVICE float round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// sum += left right, by all lanes of a warp together: volatile, so that it is not moved to where
// some lanes alone use the sum.
NAS_DEVICE void multiply_add(Entries& sum, const Left& left, const Right& right) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
      : "r"(__float_as_uint(left.at[0])), "r"(__float_as_uint(left.at[1])),
        "r"(__float_as_uint(left.at[2])), "r"(__float_as_uint(left.at[3])),
        "r"(__float_as_uint(right.at[0])), "r"(__float_as_uint(right.at[1])));
}

#elif defined(NAS_EMULATION)

// To nearest, ties away from zero, as the instruction does.
inline float round_to_tf32(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7f800000) == 0x7f800000) return x;
  return float_of((bits + 0x1000) & ~0x1fffu);
}

inline void multiply_add(Entries& sum, const Left& left, const Right& right) {
  struct Own {
    Left left;
    Right right;
  };
  Own all[32];
  emulation::Machine::get().gather(Own{left, right}, all);
  const int q = int(threadIdx.x) % 32 / 4, r = int(threadIdx.x) % 4;
  for (int i = 0; i < 4; ++i) {
    const int half = i / 2, column = 2 * r + i % 2;
    for (int k = 0; k < kInner; ++k) {
      sum.at[i] += all[4 * q + k % 4].left.at[half + k / 4 * 2] *
                   all[4 * column + k % 4].right.at[k / 4];
    }
  }
}

#else  // the host's side of a file for the device, which never calls them

NAS_DEVICE float round_to_tf32(float x) { return x; }
NAS_DEVICE void multiply_add(Entries&, const Left&, const Right&) {}

#endif

}  // namespace nas::cuda
