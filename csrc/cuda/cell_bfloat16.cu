#include "cell.cuh"

namespace nas::cuda {
NAS_KERNELS_FOR(BFloat16)
}  // namespace nas::cuda
