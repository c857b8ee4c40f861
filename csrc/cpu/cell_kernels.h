// Bodies of cell.h, included once by each build with NAS_TRANSFER_TARGET as its namespace.
#include "cpu/cell.h"

namespace nas_transfer::NAS_TRANSFER_TARGET {

int lanes() {
#if defined(__AVX512F__)
  return 16;
#elif defined(__AVX2__)
  return 8;
#else
  return 4;
#endif
}

}  // namespace nas_transfer::NAS_TRANSFER_TARGET
