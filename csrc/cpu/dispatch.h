// Which of the compiled kernels this processor runs.

#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace nas {

// Names of the instruction sets that are compiled in and that this processor has, best first.
std::vector<std::string> instruction_sets();

// The kernels in use: the best ones, unless NAS_TRANSFER_INSTRUCTIONS names others.
const Kernels& kernels();

}  // namespace nas
