#include "cpu/instruction_set.h"

namespace nas_transfer {
namespace {

// The features asked for are those that nas/ops/recipe.py compiles each build with.
InstructionSet detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return InstructionSet::portable;
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
    return InstructionSet::avx512;
  }
  return InstructionSet::avx2;
#else
  return InstructionSet::portable;
#endif
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet found = detect();
  return found;
}

}  // namespace nas_transfer
