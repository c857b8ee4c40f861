// The table of kernels of the instruction set that the including file was compiled for.

#pragma once

#include <cmath>

#include "backward.h"
#include "forward.h"

namespace nas::NAS_ISA {

template <typename T>
int64_t bytes_of(const CellShape& shape, int64_t threads) {
  CellForward<T> forward{};
  CellBackward<T> backward{};
  forward.shape = backward.shape = shape;
  const ThreadPool pool{nullptr, threads};
  return std::max(ForwardCell<T>(forward, pool, nullptr).workspace_bytes(),
                  BackwardCell<T>(backward, pool, nullptr).workspace_bytes());
}

inline Kernels kernels(const char* name) {
  return {
      name,
      [](const CellShape& shape, int64_t threads, bool is_double) {
        return is_double ? bytes_of<double>(shape, threads) : bytes_of<float>(shape, threads);
      },
      [](const CellShape& shape) {
        return Kept<float>(Geometry<float>(shape)).size() * kLanes;
      },
      [](const CellForward<float>& call, const ThreadPool& pool, void* workspace) {
        ForwardCell<float>(call, pool, workspace).run();
      },
      [](const CellForward<double>& call, const ThreadPool& pool, void* workspace) {
        ForwardCell<double>(call, pool, workspace).run();
      },
      [](const CellBackward<float>& call, const ThreadPool& pool, void* workspace) {
        BackwardCell<float>(call, pool, workspace).run();
      },
      [](const CellBackward<double>& call, const ThreadPool& pool, void* workspace) {
        BackwardCell<double>(call, pool, workspace).run();
      },
  };
}

}  // namespace nas::NAS_ISA
