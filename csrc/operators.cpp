// The operators that PyTorch's dispatcher knows: schemas, argument checks, and the call into the
// kernels. What gradients they have, and their shapes without data, is said in nas/ops/native.py.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "cell.h"
#include "cpu/dispatch.h"
#include "workspace.h"

namespace nas {
namespace {

using at::Tensor;
using std::optional;

void check_tensor(const Tensor& x, const char* name, at::IntArrayRef shape, const Tensor& like) {
  TORCH_CHECK(x.device() == like.device(), name, " must be on ", like.device(),
              " as `weights` is, not on ", x.device());
  TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, " must be ", like.scalar_type(),
              " as `weights` is, not ", x.scalar_type());
  TORCH_CHECK(x.sizes() == shape, name, " must be ", shape, ", not ", x.sizes());
  TORCH_CHECK(x.is_contiguous(), name, " must be contiguous; it has strides ", x.strides());
}

// [N, C, H, W] whose memory is [N, H, W, C].
void check_images(const Tensor& x, const char* name, const Tensor& like) {
  TORCH_CHECK(x.dim() == 4, name, " must be [images, channels, height, width], not ", x.sizes());
  TORCH_CHECK(x.numel() > 0, name, " is empty: ", x.sizes());
  TORCH_CHECK(x.device() == like.device(), name, " must be on ", like.device(),
              " as `weights` is, not on ", x.device());
  TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, " must be ", like.scalar_type(),
              " as `weights` is, not ", x.scalar_type());
  TORCH_CHECK(x.permute({0, 2, 3, 1}).is_contiguous(), name,
              " must be contiguous in channels-last format; it has strides ", x.strides());
}

CellShape check_shape(const Tensor& before, const Tensor& previous, const Tensor& weights,
                      const Tensor& operations, const Tensor& bypass,
                      const optional<Tensor>& active, int64_t channels, int64_t partial,
                      bool reduction, bool previous_reduction) {
  TORCH_CHECK(weights.is_floating_point() &&
                  (weights.scalar_type() == at::kFloat || weights.scalar_type() == at::kDouble),
              "weights must be float32 or float64, not ", weights.scalar_type());
  TORCH_CHECK(channels > 0 && partial > 0 && channels % partial == 0,
              "channels must be a positive multiple of partial, not ", channels, " and ", partial);
  check_images(before, "before", weights);
  check_images(previous, "previous", weights);
  CellShape shape{previous.size(0), previous.size(2), previous.size(3),  before.size(2),
                  before.size(3),   before.size(1),   previous.size(1),  channels,
                  partial,          reduction,        previous_reduction};
  TORCH_CHECK(before.size(0) == shape.images, "before has ", before.size(0), " images, previous ",
              shape.images);
  const auto halved = [&](int64_t size) { return previous_reduction ? (size + 1) / 2 : size; };
  TORCH_CHECK(
      halved(shape.before_height) == shape.height && halved(shape.before_width) == shape.width,
      "before of ", shape.before_height, " x ", shape.before_width, " does not fit previous of ",
      shape.height, " x ", shape.width,
      previous_reduction ? ": it must be twice as large" : ": they must be equal");
  check_tensor(weights, "weights", {shape.weights()}, weights);
  check_tensor(operations, "operations", {kEdges, kOperations}, weights);
  check_tensor(bypass, "bypass", {kEdges}, weights);
  if (active) {
    TORCH_CHECK(
        active->device().is_cpu() && active->scalar_type() == at::kBool &&
            active->is_contiguous() && active->sizes() == at::IntArrayRef({kEdges, kOperations}),
        "active must be contiguous booleans [", kEdges, ", ", kOperations, "] on the CPU, not ",
        active->scalar_type(), " ", active->sizes(), " on ", active->device());
  }
  return shape;
}

// `none` computes nothing; of the others, all that nobody switched off.
void find_live(bool (&live)[kEdges][kOperations], const optional<Tensor>& active) {
  const bool* allowed = active ? active->const_data_ptr<bool>() : nullptr;
  for (int i = 0; i < kEdges * kOperations; ++i) {
    live[i / kOperations][i % kOperations] = i % kOperations != kNone && (!allowed || allowed[i]);
  }
}

// ATen's threads. A call from inside a parallel region stays on its thread.
void run_parallel(int64_t units, void (*body)(void*, int64_t, int64_t), void* context) {
  if (at::in_parallel_region()) {
    for (int64_t unit = 0; unit < units; ++unit) body(context, unit, 0);
    return;
  }
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    const int64_t thread = at::get_thread_num();
    for (int64_t unit = begin; unit < end; ++unit) body(context, unit, thread);
  });
}
ThreadPool thread_pool() {
  return {run_parallel, at::in_parallel_region() ? 1 : at::get_num_threads()};
}

// Runs one of the four kernels in the calling thread's workspace.
template <typename Call>
void run(const Call& call, void (*kernel)(const Call&, const ThreadPool&, void*), bool is_double) {
  const ThreadPool pool = thread_pool();
  kernel(call, pool, workspace(kernels().workspace_bytes(call.shape, pool.threads, is_double)));
}
void run(const CellForward<float>& call) { run(call, kernels().forward_float, false); }
void run(const CellForward<double>& call) { run(call, kernels().forward_double, true); }
void run(const CellBackward<float>& call) { run(call, kernels().backward_float, false); }
void run(const CellBackward<double>& call) { run(call, kernels().backward_double, true); }

// A tensor in memory that is used again: it goes back to its pool with the tensor. Fresh pages, which
// an ordinary tensor of this size may get at every call, cost as much as a convolution.
Tensor lend(at::IntArrayRef sizes, const at::TensorOptions& options,
            at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  const int64_t bytes = c10::multiply_integers(sizes) * int64_t(options.dtype().itemsize());
  const auto release = [bytes](void* piece) { give_back(piece, bytes); };
  if (format == at::MemoryFormat::Contiguous) {
    return at::from_blob(borrow(bytes), sizes, release, options);
  }
  return at::from_blob(borrow(bytes), sizes, c10::get_channels_last_strides_2d(sizes), release,
                       options);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixed_cell(
    const Tensor& before, const Tensor& previous, const Tensor& weights, const Tensor& running_mean,
    const Tensor& running_variance, const Tensor& operations, const Tensor& bypass,
    const optional<Tensor>& active, int64_t channels, int64_t partial, bool reduction,
    bool previous_reduction, bool training, bool keep) {
  const CellShape shape = check_shape(before, previous, weights, operations, bypass, active,
                                      channels, partial, reduction, previous_reduction);
  check_tensor(running_mean, "running_mean", {shape.statistics()}, weights);
  check_tensor(running_variance, "running_variance", {shape.statistics()}, weights);
  TORCH_CHECK(!training || shape.images * shape.node_height() * shape.node_width() > 1,
              "batch normalisation in training needs more than one value per channel: got ",
              shape.images, " image whose nodes have ", shape.node_height(), " x ",
              shape.node_width(), " pixels");
  Tensor output =
      lend({shape.images, kNodes * channels, shape.node_height(), shape.node_width()},
           weights.options(), at::MemoryFormat::ChannelsLast);
  Tensor states = lend({2, shape.images, shape.height, shape.width, channels}, weights.options());
  Tensor mean = at::empty_like(running_mean), deviation = at::empty_like(running_mean),
         variance = at::empty_like(running_mean);
  Tensor kept = keep ? lend({kernels().kept_numbers(shape)}, weights.options())
                     : at::empty({0}, weights.options());
  AT_DISPATCH_FLOATING_TYPES(weights.scalar_type(), "mixed_cell", [&] {
    CellForward<scalar_t> call{};
    call.shape = shape;
    call.training = training;
    find_live(call.live, active);
    call.before = before.const_data_ptr<scalar_t>();
    call.previous = previous.const_data_ptr<scalar_t>();
    call.weights = weights.const_data_ptr<scalar_t>();
    call.running_mean = running_mean.const_data_ptr<scalar_t>();
    call.running_variance = running_variance.const_data_ptr<scalar_t>();
    call.operations = operations.const_data_ptr<scalar_t>();
    call.bypass = bypass.const_data_ptr<scalar_t>();
    call.output = output.mutable_data_ptr<scalar_t>();
    call.states = states.mutable_data_ptr<scalar_t>();
    call.mean = mean.mutable_data_ptr<scalar_t>();
    call.reciprocal_deviation = deviation.mutable_data_ptr<scalar_t>();
    call.variance = variance.mutable_data_ptr<scalar_t>();
    call.kept = keep ? kept.mutable_data_ptr<scalar_t>() : nullptr;
    run(call);
  });
  return {output, states, mean, deviation, variance, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixed_cell_backward(
    const Tensor& gradient, const Tensor& before, const Tensor& previous, const Tensor& weights,
    const Tensor& operations, const Tensor& bypass, const optional<Tensor>& active,
    const Tensor& output, const Tensor& states, const Tensor& mean,
    const Tensor& reciprocal_deviation, const Tensor& kept, int64_t channels, int64_t partial,
    bool reduction, bool previous_reduction, bool training, bool need_before, bool need_previous,
    bool need_weights, bool need_mixing) {
  const CellShape shape = check_shape(before, previous, weights, operations, bypass, active,
                                      channels, partial, reduction, previous_reduction);
  check_images(gradient, "gradient", weights);
  check_images(output, "output", weights);
  TORCH_CHECK(gradient.sizes() == output.sizes(), "gradient must be ", output.sizes(), ", not ",
              gradient.sizes());
  TORCH_CHECK(output.sizes() == at::IntArrayRef({shape.images, kNodes * channels,
                                                 shape.node_height(), shape.node_width()}),
              "output is ", output.sizes(), ", which is not what this cell gives");
  check_tensor(states, "states", {2, shape.images, shape.height, shape.width, channels}, weights);
  check_tensor(mean, "mean", {shape.statistics()}, weights);
  check_tensor(reciprocal_deviation, "reciprocal_deviation", {shape.statistics()}, weights);
  check_tensor(kept, "kept", {kernels().kept_numbers(shape)}, weights);
  const auto make = [](const Tensor& like, bool needed) {
    return needed ? at::empty_like(like) : at::empty({0}, like.options());
  };
  const auto make_images = [&](const Tensor& like, bool needed) {
    return needed ? lend(like.sizes(), like.options(), at::MemoryFormat::ChannelsLast)
                  : make(like, false);
  };
  Tensor before_gradient = make_images(before, need_before),
         previous_gradient = make_images(previous, need_previous);
  Tensor weights_gradient = make(weights, need_weights);
  Tensor operations_gradient = make(operations, need_mixing),
         bypass_gradient = make(bypass, need_mixing);
  AT_DISPATCH_FLOATING_TYPES(weights.scalar_type(), "mixed_cell_backward", [&] {
    const auto wanted = [](Tensor& x, bool needed) {
      return needed ? x.mutable_data_ptr<scalar_t>() : nullptr;
    };
    CellBackward<scalar_t> call{};
    call.shape = shape;
    call.training = training;
    find_live(call.live, active);
    call.before = before.const_data_ptr<scalar_t>();
    call.previous = previous.const_data_ptr<scalar_t>();
    call.weights = weights.const_data_ptr<scalar_t>();
    call.operations = operations.const_data_ptr<scalar_t>();
    call.bypass = bypass.const_data_ptr<scalar_t>();
    call.output = output.const_data_ptr<scalar_t>();
    call.states = states.const_data_ptr<scalar_t>();
    call.mean = mean.const_data_ptr<scalar_t>();
    call.reciprocal_deviation = reciprocal_deviation.const_data_ptr<scalar_t>();
    call.kept = kept.const_data_ptr<scalar_t>();
    call.output_gradient = gradient.const_data_ptr<scalar_t>();
    call.before_gradient = wanted(before_gradient, need_before);
    call.previous_gradient = wanted(previous_gradient, need_previous);
    call.weights_gradient = wanted(weights_gradient, need_weights);
    call.operations_gradient = wanted(operations_gradient, need_mixing);
    call.bypass_gradient = wanted(bypass_gradient, need_mixing);
    run(call);
  });
  return {before_gradient, previous_gradient, weights_gradient, operations_gradient,
          bypass_gradient};
}

TORCH_LIBRARY(nas_transfer, m) {
  m.def(
      "mixed_cell(Tensor before, Tensor previous, Tensor weights, Tensor running_mean, "
      "Tensor running_variance, Tensor operations, Tensor bypass, Tensor? active, int channels, "
      "int partial, bool reduction, bool previous_reduction, bool training, bool keep) "
      "-> (Tensor output, Tensor states, Tensor mean, Tensor reciprocal_deviation, "
      "Tensor variance, Tensor kept)");
  m.def(
      "mixed_cell_backward(Tensor gradient, Tensor before, Tensor previous, Tensor weights, "
      "Tensor operations, Tensor bypass, Tensor? active, Tensor output, Tensor states, "
      "Tensor mean, Tensor reciprocal_deviation, Tensor kept, int channels, int partial, bool "
      "reduction, "
      "bool previous_reduction, bool training, bool need_before, bool need_previous, "
      "bool need_weights, bool need_mixing) "
      "-> (Tensor before, Tensor previous, Tensor weights, Tensor operations, Tensor bypass)");
}

TORCH_LIBRARY_IMPL(nas_transfer, CPU, m) {
  m.impl("mixed_cell", mixed_cell);
  m.impl("mixed_cell_backward", mixed_cell_backward);
}

}  // namespace
}  // namespace nas
