#define NAS_TRANSFER_TARGET avx2
#include "cpu/cell_kernels.h"
