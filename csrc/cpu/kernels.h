// The table of kernels that each instruction set's file gives and dispatch.h chooses from.

#pragma once

#include "../cell.h"
#include "../stem.h"

namespace nas {

// Calls body(context, unit, thread) for all units; thread < threads tells whose scratch to use.
struct ThreadPool {
  void (*run)(int64_t units, void (*body)(void*, int64_t, int64_t), void* context);
  int64_t threads;
};

// Forward and backward for one kind of numbers. `workspace` is 64-byte aligned and as large as told.
template <typename Shape, typename Forward, typename Backward>
struct Directions {
  int64_t (*workspace_bytes)(const Shape& shape, int64_t threads);
  void (*forward)(const Forward&, const ThreadPool&, void* workspace);
  void (*backward)(const Backward&, const ThreadPool&, void* workspace);

  void run(const Forward& call, const ThreadPool& pool, void* workspace) const {
    forward(call, pool, workspace);
  }
  void run(const Backward& call, const ThreadPool& pool, void* workspace) const {
    backward(call, pool, workspace);
  }
};

// All kernels for images stored as T and parameters as P.
template <typename T, typename P = T>
struct NumberKernels {
  Directions<CellShape, CellForward<T, P>, CellBackward<T, P>> cell;
  Directions<StemShape, StemForward<T, P>, StemBackward<T, P>> stem;

  const auto& of(const CellForward<T, P>&) const { return cell; }
  const auto& of(const CellBackward<T, P>&) const { return cell; }
  const auto& of(const StemForward<T, P>&) const { return stem; }
  const auto& of(const StemBackward<T, P>&) const { return stem; }
};

// All kernels of one instruction set.
struct Kernels {
  const char* name;
  int64_t (*kept_numbers)(const CellShape& shape);
  NumberKernels<float> of_float;
  NumberKernels<double> of_double;
  NumberKernels<bfloat16, float> of_bfloat16;

  template <template <typename, typename> typename Call>
  const auto& of(const Call<float, float>& call) const { return of_float.of(call); }
  template <template <typename, typename> typename Call>
  const auto& of(const Call<double, double>& call) const { return of_double.of(call); }
  template <template <typename, typename> typename Call>
  const auto& of(const Call<bfloat16, float>& call) const { return of_bfloat16.of(call); }
};

}  // namespace nas
