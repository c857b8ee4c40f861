// The operators for any device: schemas, argument checks, memory for the results and the calls into
// the kernels, cell by cell.
//
// `Device` has: image_type(previous, weights), the type that images must have; kTypeOwner, the
// argument that says so; dispatch(type, f), which calls f with one image's and one parameter's
// number; kept_numbers(shape), make(sizes, options, format), which gives large tensors their memory,
// and run(call, weights).

#pragma once

#include <ATen/ATen.h>

#include <tuple>

#include "chain.h"

namespace nas {

using at::Tensor;
using std::optional;

constexpr const char* kForwardSchema =
    "mixed_cells(Tensor before, Tensor previous, Tensor weights, Tensor running_mean, "
    "Tensor running_variance, Tensor operations, Tensor bypass, Tensor? active, int[] channels, "
    "bool[] reduction, int partial, bool previous_reduction, bool training, bool keep) "
    "-> (Tensor output, Tensor mean, Tensor reciprocal_deviation, Tensor variance, Tensor kept)";
constexpr const char* kBackwardSchema =
    "mixed_cells_backward(Tensor gradient, Tensor before, Tensor previous, Tensor weights, "
    "Tensor operations, Tensor bypass, Tensor? active, Tensor output, Tensor mean, "
    "Tensor reciprocal_deviation, Tensor kept, int[] channels, bool[] reduction, int partial, "
    "bool previous_reduction, bool training, bool need_before, bool need_previous, "
    "bool need_weights, bool need_mixing) "
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

inline void check_parameters(const Tensor& weights) {
  TORCH_CHECK(weights.scalar_type() == at::kFloat || weights.scalar_type() == at::kDouble,
              "weights must be float32 or float64, not ", weights.scalar_type());
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

inline int64_t numbers(const std::vector<Link>& chain, int64_t (CellShape::*of)() const) {
  int64_t total = 0;
  for (const Link& link : chain) total += (link.shape.*of)();
  return total;
}

// The cells that the arguments of both operators describe.
template <typename Device>
std::vector<Link> check_chain(const Tensor& before, const Tensor& previous, const Tensor& weights,
                              const Tensor& operations, const Tensor& bypass,
                              const optional<Tensor>& active, at::IntArrayRef channels,
                              const c10::List<bool>& reduction, int64_t partial,
                              bool previous_reduction, bool training) {
  check_parameters(weights);
  const auto count = int64_t(channels.size());
  TORCH_CHECK(count > 0 && count == int64_t(reduction.size()),
              "channels and reduction must be of one length, that of the chain, not ", count, " and ",
              reduction.size());
  std::vector<std::pair<int64_t, bool>> sizes;
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK(channels[i] > 0 && partial > 0 && channels[i] % partial == 0,
                "channels must be a positive multiple of partial, not ", channels[i], " and ",
                partial);
    sizes.emplace_back(channels[i], reduction[i]);
  }
  const at::ScalarType type = Device::image_type(previous, weights);
  check_images(previous, "previous", weights, type, "weights");
  check_images(before, "before", weights, type, Device::kTypeOwner);
  const CellShape first{previous.size(0), previous.size(2), previous.size(3), before.size(2),
                        before.size(3),   before.size(1),   previous.size(1), 0,
                        partial,          false,            previous_reduction};
  TORCH_CHECK(before.size(0) == first.images, "before has ", before.size(0), " images, previous ",
              first.images);
  const auto halved = [&](int64_t size) { return previous_reduction ? (size + 1) / 2 : size; };
  TORCH_CHECK(
      halved(first.before_height) == first.height && halved(first.before_width) == first.width,
      "before of ", first.before_height, " x ", first.before_width, " does not fit previous of ",
      first.height, " x ", first.width,
      previous_reduction ? ": it must be twice as large" : ": they must be equal");
  std::vector<Link> chain = make_chain(first, sizes, Device::kept_numbers);
  check_tensor(weights, "weights", {numbers(chain, &CellShape::weights)}, weights);
  check_tensor(operations, "operations", {count, kEdges, kOperations}, weights);
  check_tensor(bypass, "bypass", {count, kEdges}, weights);
  if (active) {
    TORCH_CHECK(active->device().is_cpu() && active->scalar_type() == at::kBool &&
                    active->is_contiguous() &&
                    active->sizes() == at::IntArrayRef({count, kEdges, kOperations}),
                "active must be contiguous booleans [", count, ", ", kEdges, ", ", kOperations,
                "] on the CPU, not ", active->scalar_type(), " ", active->sizes(), " on ",
                active->device());
  }
  const CellShape& last = chain.back().shape;  // the smallest
  TORCH_CHECK(!training || last.images * last.node_height() * last.node_width() > 1,
              "batch normalisation in training needs more than one value per channel: got ",
              last.images, " image whose nodes have ", last.node_height(), " x ",
              last.node_width(), " pixels");
  return chain;
}

// `none` computes nothing; of the others, all that nobody switched off.
inline void find_live(bool (&live)[kEdges][kOperations], const optional<Tensor>& active,
                      int64_t cell) {
  const bool* allowed =
      active ? active->const_data_ptr<bool>() + cell * kEdges * kOperations : nullptr;
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

inline int64_t kept_by(const std::vector<Link>& chain) {
  return chain.back().kept + chain.back().room(true, true);
}
inline std::vector<int64_t> output_sizes(const CellShape& last) {
  return {last.images, kNodes * last.channels, last.node_height(), last.node_width()};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixed_cells(
    const Tensor& before, const Tensor& previous, const Tensor& weights, const Tensor& running_mean,
    const Tensor& running_variance, const Tensor& operations, const Tensor& bypass,
    const optional<Tensor>& active, at::IntArrayRef channels, const c10::List<bool>& reduction,
    int64_t partial, bool previous_reduction, bool training, bool keep) {
  const auto chain =
      check_chain<Device>(before, previous, weights, operations, bypass, active, channels,
                          reduction, partial, previous_reduction, training);
  const int64_t statistics = numbers(chain, &CellShape::statistics);
  check_tensor(running_mean, "running_mean", {statistics}, weights);
  check_tensor(running_variance, "running_variance", {statistics}, weights);
  Tensor output = Device::make(output_sizes(chain.back().shape), previous.options(),
                               at::MemoryFormat::ChannelsLast);
  Tensor mean = at::empty_like(running_mean), deviation = at::empty_like(running_mean),
         variance = at::empty_like(running_mean);
  Tensor kept = keep ? Device::make({kept_by(chain)}, previous.options())
                     : at::empty({0}, previous.options());
  Tensor rooms[2];  // where nothing is kept: of the two cells before, whose outputs are still read
  Device::dispatch(previous.scalar_type(), [&](auto image, auto parameter) {
    using T = decltype(image);
    using P = decltype(parameter);
    const T* inputs[2] = {const_data<T>(before), const_data<T>(previous)};
    for (size_t i = 0; i < chain.size(); ++i) {
      const Link& link = chain[i];
      const bool last = i + 1 == chain.size();
      Tensor room = keep ? kept : Device::make({link.room(last, false)}, previous.options());
      T* at = mutable_data<T>(room) + (keep ? link.kept : 0);
      if (keep) {  // all of a result has the same bits for the same input
        link.for_gaps(last, [&](int64_t first, int64_t count) {
          kept.narrow(0, first, count).zero_();
        });
      }
      CellForward<T, P> call{};
      call.shape = link.shape;
      call.training = training;
      find_live(call.live, active, int64_t(i));
      call.before = inputs[0];
      call.previous = inputs[1];
      call.weights = const_data<P>(weights) + link.weights;
      call.running_mean = const_data<P>(running_mean) + link.statistics;
      call.running_variance = const_data<P>(running_variance) + link.statistics;
      call.operations = const_data<P>(operations) + i * kEdges * kOperations;
      call.bypass = const_data<P>(bypass) + i * kEdges;
      call.output = last ? mutable_data<T>(output) : at + link.output_at();
      call.states = at;
      call.mean = mutable_data<P>(mean) + link.statistics;
      call.reciprocal_deviation = mutable_data<P>(deviation) + link.statistics;
      call.variance = mutable_data<P>(variance) + link.statistics;
      call.kept = keep ? at + link.convolutions_at(last) : nullptr;
      Device::run(call, weights);
      inputs[0] = inputs[1];
      inputs[1] = call.output;
      rooms[i % 2] = room;
    }
  });
  return {output, mean, deviation, variance, kept};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixed_cells_backward(
    const Tensor& gradient, const Tensor& before, const Tensor& previous, const Tensor& weights,
    const Tensor& operations, const Tensor& bypass, const optional<Tensor>& active,
    const Tensor& output, const Tensor& mean, const Tensor& reciprocal_deviation,
    const Tensor& kept, at::IntArrayRef channels, const c10::List<bool>& reduction, int64_t partial,
    bool previous_reduction, bool training, bool need_before, bool need_previous,
    bool need_weights, bool need_mixing) {
  const auto chain =
      check_chain<Device>(before, previous, weights, operations, bypass, active, channels,
                          reduction, partial, previous_reduction, training);
  const at::ScalarType type = previous.scalar_type();
  check_images(gradient, "gradient", weights, type, Device::kTypeOwner);
  check_images(output, "output", weights, type, Device::kTypeOwner);
  TORCH_CHECK(gradient.sizes() == output.sizes(), "gradient must be ", output.sizes(), ", not ",
              gradient.sizes());
  TORCH_CHECK(output.sizes() == at::IntArrayRef(output_sizes(chain.back().shape)), "output is ",
              output.sizes(), ", which is not what these cells give");
  const int64_t statistics = numbers(chain, &CellShape::statistics);
  check_tensor(mean, "mean", {statistics}, weights);
  check_tensor(reciprocal_deviation, "reciprocal_deviation", {statistics}, weights);
  check_tensor(kept, "kept", {kept_by(chain)}, previous);
  const auto make = [](const Tensor& like, bool needed) {
    return needed ? at::empty_like(like) : at::empty({0}, like.options());
  };
  Tensor weights_gradient = make(weights, need_weights);
  Tensor operations_gradient = make(operations, need_mixing),
         bypass_gradient = make(bypass, need_mixing);
  const auto make_images = [&](const CellShape& shape, bool first, bool needed) {
    if (!needed) return at::empty({0}, previous.options());
    const std::vector<int64_t> sizes =
        first ? std::vector<int64_t>{shape.images, shape.before_channels, shape.before_height,
                                     shape.before_width}
              : std::vector<int64_t>{shape.images, shape.previous_channels, shape.height,
                                     shape.width};
    return Device::make(sizes, previous.options(), at::MemoryFormat::ChannelsLast);
  };
  // The gradient of the output of the cell at hand, and what the cell after it adds to that of the
  // cell before it.
  Tensor complete = gradient, begun;
  Device::dispatch(type, [&](auto image, auto parameter) {
    using T = decltype(image);
    using P = decltype(parameter);
    // What cell i gave; -1 and -2 are the inputs of the chain.
    const auto given = [&](int64_t i) {
      if (i < 0) return const_data<T>(i == -1 ? previous : before);
      const Link& link = chain[i];
      const bool last = i + 1 == int64_t(chain.size());
      return last ? const_data<T>(output) : const_data<T>(kept) + link.kept + link.output_at();
    };
    for (auto i = int64_t(chain.size()) - 1; i >= 0; --i) {
      const Link& link = chain[i];
      const bool last = i + 1 == int64_t(chain.size());
      CellBackward<T, P> call{};
      Tensor to_before =
          make_images(link.shape, true, i > 1 || (i == 1 ? need_previous : need_before));
      call.previous_begun = begun.defined() && begun.numel();
      Tensor to_previous = call.previous_begun
                               ? begun
                               : make_images(link.shape, false, i > 0 || need_previous);
      call.shape = link.shape;
      call.training = training;
      find_live(call.live, active, i);
      call.before = given(i - 2);
      call.previous = given(i - 1);
      call.weights = const_data<P>(weights) + link.weights;
      call.operations = const_data<P>(operations) + i * kEdges * kOperations;
      call.bypass = const_data<P>(bypass) + i * kEdges;
      call.output = given(i);
      call.states = const_data<T>(kept) + link.kept;
      call.mean = const_data<P>(mean) + link.statistics;
      call.reciprocal_deviation = const_data<P>(reciprocal_deviation) + link.statistics;
      call.kept = call.states + link.convolutions_at(last);
      call.output_gradient = const_data<T>(complete);
      call.before_gradient = to_before.numel() ? mutable_data<T>(to_before) : nullptr;
      call.previous_gradient = to_previous.numel() ? mutable_data<T>(to_previous) : nullptr;
      if (need_weights) call.weights_gradient = mutable_data<P>(weights_gradient) + link.weights;
      if (need_mixing) {
        call.operations_gradient =
            mutable_data<P>(operations_gradient) + i * kEdges * kOperations;
        call.bypass_gradient = mutable_data<P>(bypass_gradient) + i * kEdges;
      }
      Device::run(call, weights);
      complete = to_previous;
      begun = to_before;
    }
  });
  return {begun, complete, weights_gradient, operations_gradient, bypass_gradient};
}

}  // namespace nas
