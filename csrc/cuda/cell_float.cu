#include "cell.cuh"

namespace nas::cuda {

int64_t kept_numbers(const CellShape& shape) { return Geometry{shape}.kept(); }

NAS_KERNELS_FOR(float)

}  // namespace nas::cuda
