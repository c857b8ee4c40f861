// The table of kernels of the instruction set that the including file was compiled for.

#pragma once

#include <cmath>

#include "backward.h"
#include "forward.h"
#include "kernels.h"
#include "stem.h"

namespace nas::NAS_ISA {

template <typename S, typename T>
NumberKernels<S, T> kernels_of() {
  return {
      {
          [](const CellShape& shape, int64_t threads) {
            CellForward<S, T> forward{};
            CellBackward<S, T> backward{};
            forward.shape = backward.shape = shape;
            const ThreadPool pool{nullptr, threads};
            return std::max(ForwardCell<S, T>(forward, pool, nullptr).workspace_bytes(),
                            BackwardCell<S, T>(backward, pool, nullptr).workspace_bytes());
          },
          [](const CellForward<S, T>& call, const ThreadPool& pool, void* workspace) {
            ForwardCell<S, T>(call, pool, workspace).run();
          },
          [](const CellBackward<S, T>& call, const ThreadPool& pool, void* workspace) {
            BackwardCell<S, T>(call, pool, workspace).run();
          },
      },
      {
          [](const StemShape& shape, int64_t threads) {
            return std::max(Stem<S, T>(shape, threads, nullptr, false).workspace_bytes(),
                            Stem<S, T>(shape, threads, nullptr, true).workspace_bytes());
          },
          [](const StemForward<S, T>& call, const ThreadPool& pool, void* workspace) {
            Stem<S, T>(call.shape, pool.threads, workspace, false).forward(call, pool);
          },
          [](const StemBackward<S, T>& call, const ThreadPool& pool, void* workspace) {
            Stem<S, T>(call.shape, pool.threads, workspace, true).backward(call, pool);
          },
      },
  };
}

inline Kernels kernels(const char* name) {
  return {
      name,
      [](const CellShape& shape) {
        return Kept<float>(Geometry<float>(shape)).size() * kLanes;
      },
      kernels_of<float, float>(),
      kernels_of<double, double>(),
      kernels_of<bfloat16, float>(),
  };
}

}  // namespace nas::NAS_ISA
