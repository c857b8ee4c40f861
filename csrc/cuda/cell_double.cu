#include "cell.cuh"

namespace nas::cuda {
NAS_KERNELS_FOR(double)
}  // namespace nas::cuda
