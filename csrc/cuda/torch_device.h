// What csrc/operators.h asks of a device, for kernels.h.

#pragma once

#include <ATen/Context.h>
#include <c10/core/ScalarType.h>

#include "../operators.h"
#include "kernels.h"

namespace nas::cuda {

template <typename Owner>
struct TorchDevice {
  static constexpr const char* kTypeOwner = "previous";

  // Images are of the weights' type or, for weights of single precision, half as wide.
  static at::ScalarType image_type(const at::Tensor& previous, const at::Tensor& weights) {
    const at::ScalarType type = previous.scalar_type();
    const bool narrow = type == at::kBFloat16 || type == at::kHalf;
    return narrow && weights.scalar_type() == at::kFloat ? type : weights.scalar_type();
  }
  // torch.backends.cuda.matmul.fp32_precision, which the older allow_tf32 sets too. (The function
  // behind allow_tf32 refuses to answer where a program has used the newer one.)
  static bool rounds_products() {
    return at::globalContext().float32Precision(at::Float32Backend::CUDA,
                                                at::Float32Op::MATMUL) ==
           at::Float32Precision::TF32;
  }
  template <typename F>
  static void dispatch(at::ScalarType type, F&& f) {
    switch (type) {
      case at::kDouble: return f(double(), double());
      case at::kFloat: return rounds_products() ? f(Tf32(), float()) : f(float(), float());
      case at::kBFloat16: return f(BFloat16(), float());
      default: return f(Half(), float());
    }
  }
  static int64_t kept_numbers(const CellShape& shape) { return cuda::kept_numbers(shape); }
  static at::Tensor make(at::IntArrayRef sizes, const at::TensorOptions& options,
                         at::MemoryFormat format = at::MemoryFormat::Contiguous) {
    return at::empty(sizes, options, format);
  }
  // The workspace goes back to PyTorch's allocator, which hands it out again in stream order.
  template <typename Call>
  static void run(const Call& call, const at::Tensor& weights) {
    const int64_t bytes = workspace_bytes(call);
    at::Tensor workspace = at::empty({bytes}, weights.options().dtype(at::kByte));
    Owner::with_stream(weights, [&](Stream stream) {
      cuda::run(call, workspace.mutable_data_ptr(), stream);
    });
  }
};

}  // namespace nas::cuda
