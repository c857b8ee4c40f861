// The kernels for AVX2; setup.py compiles this file with the flags for it.
#if defined(__AVX2__)
#define NAS_ISA avx2
#define NAS_VECTOR_BYTES 32
#include "cell_kernels.h"

namespace nas {
Kernels avx2_kernels() { return avx2::kernels("avx2"); }
}  // namespace nas
#endif
