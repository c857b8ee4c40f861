#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace nas {

Kernels portable_kernels();
#if defined(__x86_64__)
Kernels avx2_kernels();
Kernels avx512_kernels();
#endif

namespace {

std::vector<Kernels> available() {
  std::vector<Kernels> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
    found.push_back(avx512_kernels());
  }
  if (avx2) found.push_back(avx2_kernels());
#endif
  found.push_back(portable_kernels());
  return found;
}

Kernels choose() {
  const std::vector<Kernels> found = available();
  const char* wanted = std::getenv("NAS_TRANSFER_INSTRUCTIONS");
  if (!wanted || !*wanted) return found.front();
  std::string names;
  for (const Kernels& kernels : found) {
    if (std::string(kernels.name) == wanted) return kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels.name);
  }
  throw std::runtime_error("NAS_TRANSFER_INSTRUCTIONS is '" + std::string(wanted) +
                           "', but this processor and this build have: " + names);
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& kernels : available()) names.emplace_back(kernels.name);
  return names;
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace nas
