// What the kernels need of a GPU: launches, barriers and shared memory. With NAS_EMULATION, the
// same kernels compile for the host (tests/cuda_emulation/emulation.h).

#pragma once

#include <cstdint>

#if defined(NAS_EMULATION)
#include "emulation.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

#if defined(__CUDACC__) || defined(NAS_EMULATION)
#define NAS_DEVICE __device__ __forceinline__
#define NAS_BOTH __host__ __device__ __forceinline__
#else  // csrc/cuda/operators.cpp, which needs the types alone
#define NAS_DEVICE inline
#define NAS_BOTH inline
#endif

#if defined(__CUDACC__)
#define NAS_UNROLL _Pragma("unroll")
#define NAS_UNROLL_BY(n) _Pragma(NAS_TEXT(unroll n))
#define NAS_TEXT(x) #x
#else
#define NAS_UNROLL
#define NAS_UNROLL_BY(n)
#endif

// Loads stay on their side: the compiler would gather those of many rows, for which there are not
// enough registers.
#if defined(__CUDA_ARCH__)
#define NAS_KEEP_ORDER asm volatile("" ::: "memory")
#else
#define NAS_KEEP_ORDER
#endif
// The compiler does not know any more where an integer is from, so that it does not keep what it has
// made of it.
#if defined(__CUDA_ARCH__)
#define NAS_FORGET(x) asm volatile("" : "+r"(x))
#else
#define NAS_FORGET(x)
#endif

// The emulation counts how many bytes are read or written at once.
#if defined(NAS_EMULATION)
#define NAS_TOUCHES(at, bytes) ::emulation::Machine::get().touches(at, bytes)
#else
#define NAS_TOUCHES(at, bytes)
#endif

// A kernel, of which two blocks are to fit on a multiprocessor: that leaves 128 registers a thread.
// One block where a number takes two registers.
#define NAS_KERNEL_OF(T) \
  __global__ void __launch_bounds__(nas::cuda::kThreads, sizeof(T) == 8 ? 1 : 2)

// A kernel that fills a multiprocessor by itself: its threads keep much in registers, up to 255.
#define NAS_KERNEL_ALONE __global__ void __launch_bounds__(nas::cuda::kThreads, 1)

namespace nas::cuda {

constexpr int kThreads = 256;            // of every block
constexpr int kWarps = kThreads / 32;
constexpr int kSharedBytes = 99 << 10;   // of a block: what every GPU since sm_80 has
constexpr double kEpsilon = 1e-5;        // added to variances, torch's default

#if defined(NAS_EMULATION)

using Stream = int;

template <typename... P, typename... Q>
void launch(void (*kernel)(P...), dim3 grid, int64_t shared, Stream, const Q&... arguments) {
  if (!grid.x || !grid.y) return;
  emulation::Machine::get().launch(grid, {kThreads, 1, 1}, std::size_t(shared),
                                   [&] { kernel(arguments...); });
}
inline void clear(void* memory, int64_t bytes, Stream) { std::memset(memory, 0, std::size_t(bytes)); }
NAS_DEVICE unsigned char* shared_memory() {
  return static_cast<unsigned char*>(emulation::Machine::get().shared());
}

#else

using Stream = cudaStream_t;

#if defined(__CUDACC__)

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(error));
}

// Runs `grid` blocks. Nothing is launched where there are none.
template <typename... P, typename... Q>
void launch(void (*kernel)(P...), dim3 grid, int64_t shared, Stream stream, const Q&... arguments) {
  if (!grid.x || !grid.y) return;
  if (shared > 48 << 10) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
          "asking for shared memory");
  }
  kernel<<<grid, kThreads, std::size_t(shared), stream>>>(arguments...);
  check(cudaGetLastError(), "a launch");
}
inline void clear(void* memory, int64_t bytes, Stream stream) {
  check(cudaMemsetAsync(memory, 0, std::size_t(bytes), stream), "clearing memory");
}
NAS_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

#endif
#endif

template <typename N>
NAS_BOTH N smaller(N a, N b) {
  return b < a ? b : a;
}
template <typename N>
NAS_BOTH N larger(N a, N b) {
  return a < b ? b : a;
}
NAS_BOTH int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
NAS_BOTH int round_up(int a, int b) { return (a + b - 1) / b * b; }

// Hands out pieces of one piece of memory, each on a 16-byte boundary. Over null it only counts.
class Arena {
 public:
  NAS_BOTH explicit Arena(void* memory) : start_(static_cast<unsigned char*>(memory)) {}

  template <typename T>
  NAS_BOTH T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(start_ ? start_ + used_ : nullptr);
    used_ += divide_up(count * int64_t(sizeof(T)), 16) * 16;
    return piece;
  }
  NAS_BOTH int64_t used() const { return used_; }

 private:
  unsigned char* start_;
  int64_t used_ = 0;
};

}  // namespace nas::cuda
