// What csrc/operators.h asks of a device, for the kernels of the CPU.

#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "../operators.h"
#include "../workspace.h"
#include "dispatch.h"

namespace nas {

// ATen's threads. A call from inside a parallel region stays on its thread.
inline void run_parallel(int64_t units, void (*body)(void*, int64_t, int64_t), void* context) {
  if (at::in_parallel_region()) {
    for (int64_t unit = 0; unit < units; ++unit) body(context, unit, 0);
    return;
  }
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    const int64_t thread = at::get_thread_num();
    for (int64_t unit = begin; unit < end; ++unit) body(context, unit, thread);
  });
}
inline ThreadPool thread_pool() {
  return {run_parallel, at::in_parallel_region() ? 1 : at::get_num_threads()};
}

struct Cpu {
  static constexpr const char* kTypeOwner = "previous";
  // bfloat16 where that is asked for, else as the weights.
  static at::ScalarType image_type(const Tensor& previous, const Tensor& weights) {
    const bool half = previous.scalar_type() == at::kBFloat16 && weights.scalar_type() == at::kFloat;
    return half ? at::kBFloat16 : weights.scalar_type();
  }
  template <typename F>
  static void dispatch(at::ScalarType type, F&& f) {
    if (type == at::kBFloat16) return f(bfloat16(), float());
    AT_DISPATCH_FLOATING_TYPES(type, "mixed_cells", [&] { f(scalar_t(), scalar_t()); });
  }
  static int64_t kept_numbers(const CellShape& shape) { return kernels().kept_numbers(shape); }
  // A tensor in memory that is used again: it goes back to its pool with the tensor. Fresh pages,
  // which an ordinary tensor of this size may get at every call, cost as much as a convolution.
  static Tensor make(at::IntArrayRef sizes, const at::TensorOptions& options,
                     at::MemoryFormat format = at::MemoryFormat::Contiguous) {
    const int64_t bytes = c10::multiply_integers(sizes) * int64_t(options.dtype().itemsize());
    const auto release = [bytes](void* piece) { give_back(piece, bytes); };
    if (format == at::MemoryFormat::Contiguous) {
      return at::from_blob(borrow(bytes), sizes, release, options);
    }
    return at::from_blob(borrow(bytes), sizes, c10::get_channels_last_strides_2d(sizes), release,
                         options);
  }
  // In the calling thread's workspace.
  template <typename Call>
  static void run(const Call& call, const Tensor&) {
    const ThreadPool pool = thread_pool();
    const auto& of_call = kernels().of(call);
    of_call.run(call, pool, workspace(of_call.workspace_bytes(call.shape, pool.threads)));
  }
};

}  // namespace nas
