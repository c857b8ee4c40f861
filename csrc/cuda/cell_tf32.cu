#include "cell.cuh"

namespace nas::cuda {
NAS_KERNELS_FOR(Tf32)
}  // namespace nas::cuda
