#include "cell.cuh"

namespace nas::cuda {
NAS_KERNELS_FOR(Half)
}  // namespace nas::cuda
