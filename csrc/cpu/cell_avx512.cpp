#define NAS_TRANSFER_TARGET avx512
#include "cpu/cell_kernels.h"
