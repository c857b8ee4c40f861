// Schemas and argument checks of every operation.
#include <torch/library.h>

TORCH_LIBRARY(nas_transfer, m) {}
