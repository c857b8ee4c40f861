// The kernels for any processor: 16-byte vectors, which x86-64 and Arm have from the start.
#define NAS_ISA portable
#define NAS_VECTOR_BYTES 16
#include "cell_kernels.h"

namespace nas {
Kernels portable_kernels() { return portable::kernels("portable"); }
}  // namespace nas
