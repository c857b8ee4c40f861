// The kernels for AVX-512; setup.py compiles this file with the flags for it.
#if defined(__AVX512F__)
#define NAS_ISA avx512
#define NAS_VECTOR_BYTES 64
#include "cell_kernels.h"

namespace nas {
Kernels avx512_kernels() { return avx512::kernels("avx512"); }
}  // namespace nas
#endif
