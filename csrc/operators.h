// The operators for any device: schemas, argument checks, memory for the results and the call into
// the kernels.
//
// `Device` has: image_type(previous, weights), the type that images must have; kTypeOwner, the
// argument that says so; dispatch(type, f), which calls f with one image's and one parameter's
// number; kept_numbers(shape), make(sizes, options, format), which gives large tensors their memory,
// and run(call, weights).

#pragma once

#include <ATen/ATen.h>

#include <tuple>

#include "cell.h"

namespace nas {

using at::Tensor;
using std::optional;

constexpr const char* kForwardSchema =
    "mixed_cell(Tensor before, Tensor previous, Tensor weights, Tensor running_mean, "
    "Tensor running_variance, Tensor operations, Tensor bypass, Tensor? active, int channels, "
    "int partial, bool reduction, bool previous_reduction, bool training, bool keep) "
    "-> (Tensor output, Tensor states, Tensor mean, Tensor reciprocal_deviation, "
    "Tensor variance, Tensor kept)";
constexpr const char* kBackwardSchema =
    "mixed_cell_backward(Tensor gradient, Tensor before, Tensor previous, Tensor weights, "
    "Tensor operations, Tensor bypass, Tensor? active, Tensor output, Tensor states, "
    "Tensor mean, Tensor reciprocal_deviation, Tensor kept, int channels, int partial, "
    "bool reduction, bool previous_reduction, bool training, bool need_before, "
    "bool need_previous, bool need_weights, bool need_mixing) "
    "-> (Tensor before, Tensor previous, Tensor weights, Tensor operations, Tensor bypass)";

inline void check_tensor(const Tensor& x, const char* name, at::IntArrayRef shape,
                         const Tensor& like) {
  TORCH_CHECK(x.device() == like.device(), name, " must be on ", like.device(),
              " as `weights` is, not on ", x.device());
  TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, " must be ", like.scalar_type(),
              " as `weights` is, not ", x.scalar_type());
  TORCH_CHECK(x.sizes() == shape, name, " must be ", shape, ", not ", x.sizes());
  TORCH_CHECK(x.is_contiguous(), name, " must be contiguous; it has strides ", x.strides());
}

// [N, C, H, W] whose memory is [N, H, W, C], of `type`, which `owner` has.
inline void check_images(const Tensor& x, const char* name, const Tensor& like, at::ScalarType type,
                         const char* owner) {
  TORCH_CHECK(x.dim() == 4, name, " must be [images, channels, height, width], not ", x.sizes());
  TORCH_CHECK(x.numel() > 0, name, " is empty: ", x.sizes());
  TORCH_CHECK(x.device() == like.device(), name, " must be on ", like.device(),
              " as `weights` is, not on ", x.device());
  TORCH_CHECK(x.scalar_type() == type, name, " must be ", type, " as `", owner, "` is, not ",
              x.scalar_type());
  TORCH_CHECK(x.permute({0, 2, 3, 1}).is_contiguous(), name,
              " must be contiguous in channels-last format; it has strides ", x.strides());
}

template <typename Device>
CellShape check_shape(const Tensor& before, const Tensor& previous, const Tensor& weights,
                      const Tensor& operations, const Tensor& bypass,
                      const optional<Tensor>& active, int64_t channels, int64_t partial,
                      bool reduction, bool previous_reduction) {
  TORCH_CHECK(weights.is_floating_point() &&
                  (weights.scalar_type() == at::kFloat || weights.scalar_type() == at::kDouble),
              "weights must be float32 or float64, not ", weights.scalar_type());
  TORCH_CHECK(channels > 0 && partial > 0 && channels % partial == 0,
              "channels must be a positive multiple of partial, not ", channels, " and ", partial);
  const at::ScalarType type = Device::image_type(previous, weights);
  check_images(previous, "previous", weights, type, "weights");
  check_images(before, "before", weights, type, Device::kTypeOwner);
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
inline void find_live(bool (&live)[kEdges][kOperations], const optional<Tensor>& active) {
  const bool* allowed = active ? active->const_data_ptr<bool>() : nullptr;
  for (int i = 0; i < kEdges * kOperations; ++i) {
    live[i / kOperations][i % kOperations] = i % kOperations != kNone && (!allowed || allowed[i]);
  }
}

// The type that a kernel calls a number by may be another than PyTorch's of the same bits.
template <typename T>
const T* const_data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <typename T>
T* mutable_data(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixed_cell(
    const Tensor& before, const Tensor& previous, const Tensor& weights, const Tensor& running_mean,
    const Tensor& running_variance, const Tensor& operations, const Tensor& bypass,
    const optional<Tensor>& active, int64_t channels, int64_t partial, bool reduction,
    bool previous_reduction, bool training, bool keep) {
  const CellShape shape = check_shape<Device>(before, previous, weights, operations, bypass, active,
                                      channels, partial, reduction, previous_reduction);
  check_tensor(running_mean, "running_mean", {shape.statistics()}, weights);
  check_tensor(running_variance, "running_variance", {shape.statistics()}, weights);
  TORCH_CHECK(!training || shape.images * shape.node_height() * shape.node_width() > 1,
              "batch normalisation in training needs more than one value per channel: got ",
              shape.images, " image whose nodes have ", shape.node_height(), " x ",
              shape.node_width(), " pixels");
  Tensor output =
      Device::make({shape.images, kNodes * channels, shape.node_height(), shape.node_width()},
                   previous.options(), at::MemoryFormat::ChannelsLast);
  Tensor states =
      Device::make({2, shape.images, shape.height, shape.width, channels}, previous.options());
  Tensor mean = at::empty_like(running_mean), deviation = at::empty_like(running_mean),
         variance = at::empty_like(running_mean);
  Tensor kept = keep ? Device::make({Device::kept_numbers(shape)}, previous.options())
                     : at::empty({0}, previous.options());
  Device::dispatch(previous.scalar_type(), [&](auto image, auto parameter) {
    using T = decltype(image);
    using P = decltype(parameter);
    CellForward<T, P> call{};
    call.shape = shape;
    call.training = training;
    find_live(call.live, active);
    call.before = const_data<T>(before);
    call.previous = const_data<T>(previous);
    call.weights = const_data<P>(weights);
    call.running_mean = const_data<P>(running_mean);
    call.running_variance = const_data<P>(running_variance);
    call.operations = const_data<P>(operations);
    call.bypass = const_data<P>(bypass);
    call.output = mutable_data<T>(output);
    call.states = mutable_data<T>(states);
    call.mean = mutable_data<P>(mean);
    call.reciprocal_deviation = mutable_data<P>(deviation);
    call.variance = mutable_data<P>(variance);
    call.kept = keep ? mutable_data<T>(kept) : nullptr;
    Device::run(call, weights);
  });
  return {output, states, mean, deviation, variance, kept};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixed_cell_backward(
    const Tensor& gradient, const Tensor& before, const Tensor& previous, const Tensor& weights,
    const Tensor& operations, const Tensor& bypass, const optional<Tensor>& active,
    const Tensor& output, const Tensor& states, const Tensor& mean,
    const Tensor& reciprocal_deviation, const Tensor& kept, int64_t channels, int64_t partial,
    bool reduction, bool previous_reduction, bool training, bool need_before, bool need_previous,
    bool need_weights, bool need_mixing) {
  const CellShape shape = check_shape<Device>(before, previous, weights, operations, bypass, active,
                                      channels, partial, reduction, previous_reduction);
  const at::ScalarType type = previous.scalar_type();
  check_images(gradient, "gradient", weights, type, Device::kTypeOwner);
  check_images(output, "output", weights, type, Device::kTypeOwner);
  TORCH_CHECK(gradient.sizes() == output.sizes(), "gradient must be ", output.sizes(), ", not ",
              gradient.sizes());
  TORCH_CHECK(output.sizes() == at::IntArrayRef({shape.images, kNodes * channels,
                                                 shape.node_height(), shape.node_width()}),
              "output is ", output.sizes(), ", which is not what this cell gives");
  check_tensor(states, "states", {2, shape.images, shape.height, shape.width, channels}, previous);
  check_tensor(mean, "mean", {shape.statistics()}, weights);
  check_tensor(reciprocal_deviation, "reciprocal_deviation", {shape.statistics()}, weights);
  check_tensor(kept, "kept", {Device::kept_numbers(shape)}, previous);
  const auto make = [](const Tensor& like, bool needed) {
    return needed ? at::empty_like(like) : at::empty({0}, like.options());
  };
  const auto make_images = [&](const Tensor& like, bool needed) {
    return needed ? Device::make(like.sizes(), like.options(), at::MemoryFormat::ChannelsLast)
                  : make(like, false);
  };
  Tensor before_gradient = make_images(before, need_before),
         previous_gradient = make_images(previous, need_previous);
  Tensor weights_gradient = make(weights, need_weights);
  Tensor operations_gradient = make(operations, need_mixing),
         bypass_gradient = make(bypass, need_mixing);
  Device::dispatch(previous.scalar_type(), [&](auto image, auto parameter) {
    using T = decltype(image);
    using P = decltype(parameter);
    CellBackward<T, P> call{};
    call.shape = shape;
    call.training = training;
    find_live(call.live, active);
    call.before = const_data<T>(before);
    call.previous = const_data<T>(previous);
    call.weights = const_data<P>(weights);
    call.operations = const_data<P>(operations);
    call.bypass = const_data<P>(bypass);
    call.output = const_data<T>(output);
    call.states = const_data<T>(states);
    call.mean = const_data<P>(mean);
    call.reciprocal_deviation = const_data<P>(reciprocal_deviation);
    call.kept = const_data<T>(kept);
    call.output_gradient = const_data<T>(gradient);
    call.before_gradient = need_before ? mutable_data<T>(before_gradient) : nullptr;
    call.previous_gradient = need_previous ? mutable_data<T>(previous_gradient) : nullptr;
    call.weights_gradient = need_weights ? mutable_data<P>(weights_gradient) : nullptr;
    call.operations_gradient = need_mixing ? mutable_data<P>(operations_gradient) : nullptr;
    call.bypass_gradient = need_mixing ? mutable_data<P>(bypass_gradient) : nullptr;
    Device::run(call, weights);
  });
  return {before_gradient, previous_gradient, weights_gradient, operations_gradient,
          bypass_gradient};
}

}  // namespace nas
