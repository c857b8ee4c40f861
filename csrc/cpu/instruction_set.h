// The kernels are compiled once per instruction set; the processor decides which build runs.
#pragma once

namespace nas_transfer {

enum class InstructionSet { portable, avx2, avx512 };

// The best set that this binary has and this processor and its system run. Asked once.
InstructionSet instruction_set();

}  // namespace nas_transfer
