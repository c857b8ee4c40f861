// The stem's operators for any device; see operators.h.

#pragma once

#include "operators.h"
#include "stem.h"

namespace nas {

constexpr const char* kStemSchema =
    "stem(Tensor images, Tensor weights, Tensor running_mean, Tensor running_variance, bool half, "
    "bool training) -> (Tensor output, Tensor mean, Tensor reciprocal_deviation, Tensor variance, "
    "Tensor convolution)";
constexpr const char* kStemBackwardSchema =
    "stem_backward(Tensor gradient, Tensor images, Tensor weights, Tensor mean, "
    "Tensor reciprocal_deviation, Tensor convolution, bool training) -> Tensor weights";

inline StemShape check_stem(const Tensor& images, const Tensor& weights, const Tensor& like_statistics,
                     const char* name) {
  check_parameters(weights);
  check_images(images, "images", weights, weights.scalar_type(), "weights");
  check_tensor(like_statistics, name, {like_statistics.numel()}, weights);
  const StemShape shape{images.size(0), images.size(2), images.size(3), images.size(1),
                        like_statistics.numel()};
  check_tensor(weights, "weights", {shape.weights()}, weights);
  return shape;
}

inline std::vector<int64_t> output_sizes(const StemShape& shape) {
  return {shape.images, shape.outputs, shape.height, shape.width};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> stem(const Tensor& images, const Tensor& weights,
                                                        const Tensor& running_mean,
                                                        const Tensor& running_variance, bool half,
                                                        bool training) {
  const StemShape shape = check_stem(images, weights, running_mean, "running_mean");
  check_tensor(running_variance, "running_variance", {shape.outputs}, weights);
  const at::ScalarType type = half ? at::kBFloat16 : weights.scalar_type();
  TORCH_CHECK(!half || weights.scalar_type() == at::kFloat,
              "half an output goes with float32 weights, not with ", weights.scalar_type());
  TORCH_CHECK(!training || shape.images * shape.pixels() > 1,
              "batch normalisation in training needs more than one value per channel: got one image "
              "of 1 x 1 pixels");
  const auto channels_last = at::MemoryFormat::ChannelsLast;
  Tensor output = Device::make(output_sizes(shape), weights.options().dtype(type), channels_last);
  Tensor convolution = Device::make(output_sizes(shape), weights.options(), channels_last);
  Tensor mean = at::empty_like(running_mean), deviation = at::empty_like(running_mean),
         variance = at::empty_like(running_mean);
  Device::dispatch(type, [&](auto image, auto parameter) {
    using T = decltype(image);
    using P = decltype(parameter);
    StemForward<T, P> call{};
    call.shape = shape;
    call.training = training;
    call.images = const_data<P>(images);
    call.weights = const_data<P>(weights);
    call.running_mean = const_data<P>(running_mean);
    call.running_variance = const_data<P>(running_variance);
    call.output = mutable_data<T>(output);
    call.convolution = mutable_data<P>(convolution);
    call.mean = mutable_data<P>(mean);
    call.reciprocal_deviation = mutable_data<P>(deviation);
    call.variance = mutable_data<P>(variance);
    Device::run(call, weights);
  });
  return {output, mean, deviation, variance, convolution};
}

template <typename Device>
Tensor stem_backward(const Tensor& gradient, const Tensor& images, const Tensor& weights,
                     const Tensor& mean, const Tensor& reciprocal_deviation,
                     const Tensor& convolution, bool training) {
  const StemShape shape = check_stem(images, weights, mean, "mean");
  check_tensor(reciprocal_deviation, "reciprocal_deviation", {shape.outputs}, weights);
  const at::ScalarType type = gradient.scalar_type() == at::kBFloat16 ? at::kBFloat16
                                                                      : weights.scalar_type();
  check_images(gradient, "gradient", weights, type, "weights");
  check_images(convolution, "convolution", weights, weights.scalar_type(), "weights");
  for (const Tensor* x : {&gradient, &convolution}) {
    TORCH_CHECK(x->sizes() == at::IntArrayRef(output_sizes(shape)),
                x == &gradient ? "gradient" : "convolution", " must be ", output_sizes(shape),
                ", not ", x->sizes());
  }
  Tensor weights_gradient = at::empty_like(weights);
  Device::dispatch(type, [&](auto image, auto parameter) {
    using T = decltype(image);
    using P = decltype(parameter);
    StemBackward<T, P> call{};
    call.shape = shape;
    call.training = training;
    call.images = const_data<P>(images);
    call.weights = const_data<P>(weights);
    call.convolution = const_data<P>(convolution);
    call.mean = const_data<P>(mean);
    call.reciprocal_deviation = const_data<P>(reciprocal_deviation);
    call.output_gradient = const_data<T>(gradient);
    call.weights_gradient = mutable_data<P>(weights_gradient);
    Device::run(call, weights);
  });
  return weights_gradient;
}

}  // namespace nas
