#define NAS_TRANSFER_TARGET portable
#include "cpu/cell_kernels.h"
