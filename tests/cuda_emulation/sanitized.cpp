// Runs the emulated kernels over cells of many shapes, to be compiled with a sanitizer: memory is
// exactly as large as a call asks for. Prints the number of calls.

#include <cstdio>
#include <random>
#include <vector>

#include "geometry.h"
#include "kernels.h"
#include "number.h"

namespace {

using nas::CellShape;

std::mt19937 engine(0);

std::vector<float> draw(int64_t count, float low, float high) {
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<float> numbers(static_cast<std::size_t>(count));
  for (float& number : numbers) number = uniform(engine);
  return numbers;
}

template <typename T, typename Call>
void run(const Call& call) {
  std::vector<double> workspace(  // 16-byte aligned
      static_cast<std::size_t>(nas::cuda::workspace_bytes<T>(call) + 7) / 8);
  nas::cuda::run<T>(call, workspace.data(), 0);
}

// As images are stored.
template <typename T>
std::vector<T> draw_images(int64_t count) {
  std::vector<T> images(static_cast<std::size_t>(count));
  for (T& number : images) nas::cuda::narrow(draw(1, -1, 1)[0], number);
  return images;
}

template <typename T>
void run_both(const CellShape& s, bool training, double share, bool gradients) {
  const int64_t before = s.images * s.before_height * s.before_width * s.before_channels;
  const int64_t previous = s.images * s.height * s.width * s.previous_channels;
  const int64_t output = s.images * s.node_height() * s.node_width() * 4 * s.channels;
  nas::CellForward<T, float> forward{};
  forward.shape = s;
  forward.training = training;
  std::bernoulli_distribution coin(share);
  for (auto& edge : forward.live) {
    for (int k = 1; k < nas::kOperations; ++k) edge[k] = coin(engine);
  }
  const auto images = draw_images<T>(before), others = draw_images<T>(previous);
  const auto weights = draw(s.weights(), -1, 1), mean = draw(s.statistics(), -1, 1);
  const auto variance = draw(s.statistics(), 0.5f, 1);
  const auto operations = draw(nas::kEdges * nas::kOperations, 0, 1);
  const auto bypass = draw(nas::kEdges, 0, 1);
  const auto gradient = draw_images<T>(output);
  const auto make_images = [](int64_t count) { return std::vector<T>(std::size_t(count)); };
  const auto make = [](int64_t count) { return std::vector<float>(std::size_t(count)); };
  auto nodes = make_images(output);
  auto states = make_images(2 * s.images * s.height * s.width * s.channels);
  auto means = make(s.statistics()), scales = means, variances = means;
  auto kept = make_images(nas::cuda::kept_numbers(s));
  forward.before = images.data();
  forward.previous = others.data();
  forward.weights = weights.data();
  forward.running_mean = mean.data();
  forward.running_variance = variance.data();
  forward.operations = operations.data();
  forward.bypass = bypass.data();
  forward.output = nodes.data();
  forward.states = states.data();
  forward.mean = means.data();
  forward.reciprocal_deviation = scales.data();
  forward.variance = variances.data();
  run<T>(forward);
  forward.kept = kept.data();
  run<T>(forward);

  nas::CellBackward<T, float> backward{};
  backward.shape = s;
  backward.training = training;
  std::copy(&forward.live[0][0], &forward.live[0][0] + nas::kEdges * nas::kOperations,
            &backward.live[0][0]);
  auto to_before = make_images(before), to_previous = make_images(previous);
  auto to_weights = make(s.weights());
  auto to_operations = make(nas::kEdges * nas::kOperations), to_bypass = make(nas::kEdges);
  backward.before = forward.before;
  backward.previous = forward.previous;
  backward.weights = forward.weights;
  backward.operations = forward.operations;
  backward.bypass = forward.bypass;
  backward.output = forward.output;
  backward.states = forward.states;
  backward.mean = forward.mean;
  backward.reciprocal_deviation = forward.reciprocal_deviation;
  backward.kept = forward.kept;
  backward.output_gradient = gradient.data();
  backward.operations_gradient = to_operations.data();
  backward.bypass_gradient = to_bypass.data();
  if (gradients) {
    backward.before_gradient = to_before.data();
    backward.previous_gradient = to_previous.data();
    backward.weights_gradient = to_weights.data();
  }
  run<T>(backward);
}

template <typename T>
void run_stem(const nas::StemShape& s, bool training) {
  const int64_t pixels = s.images * s.pixels();
  const auto images = draw(pixels * s.inputs, -1, 1), weights = draw(s.weights(), -1, 1);
  const auto mean = draw(s.outputs, -1, 1), variance = draw(s.outputs, 0.5f, 1);
  const auto gradient = draw_images<T>(pixels * s.outputs);
  auto output = gradient;
  auto convolution = draw(pixels * s.outputs, -1, 1);
  auto means = mean, scales = mean, variances = mean, to_weights = weights;
  run<T>(nas::StemForward<T, float>{s, training, images.data(), weights.data(), mean.data(),
                                    variance.data(), output.data(), convolution.data(),
                                    means.data(), scales.data(), variances.data()});
  run<T>(nas::StemBackward<T, float>{s, training, images.data(), weights.data(),
                                     convolution.data(), means.data(), scales.data(),
                                     gradient.data(), to_weights.data()});
}

}  // namespace

int main() {
  // images, height, width, before's height and width, its channels, previous', channels, partial
  const CellShape shapes[] = {
      {3, 5, 6, 5, 6, 3, 5, 3, 1, false, false}, {2, 9, 8, 17, 16, 8, 4, 8, 1, true, true},
      {3, 7, 5, 7, 5, 4, 8, 16, 4, true, false}, {2, 6, 6, 12, 11, 3, 2, 6, 2, false, true},
      {1, 18, 3, 18, 3, 16, 4, 16, 1, false, false}, {1, 2, 3, 2, 3, 4, 4, 132, 1, true, false},
      {2, 1, 2, 1, 3, 2, 2, 2, 1, false, true}, {9, 1, 1, 1, 1, 4, 4, 8, 1, true, false},
      {7, 5, 3, 5, 3, 4, 4, 16, 1, false, false},
  };
  // as on a large GPU, and with blocks that take all jobs of an input, of one tile or of several
  const int blocks[] = {nas::cuda::kBlocks, 12, 3};
  int calls = 0;
  for (const CellShape& shape : shapes) {
    nas::cuda::kBlocks = blocks[calls % 3];
    run_both<float>(shape, calls % 2 == 0, calls % 3 == 2 ? 0.3 : 1.0, calls % 4 != 3);
    run_both<nas::cuda::Tf32>(shape, calls % 2 == 0, calls % 3 == 2 ? 0.3 : 1.0, calls % 4 != 3);
    run_both<nas::cuda::BFloat16>(shape, calls % 2 == 0, calls % 3 == 2 ? 0.3 : 1.0, calls % 4 != 3);
    ++calls;
  }
  const nas::StemShape stems[] = {{3, 7, 5, 3, 24}, {1, 1, 2, 1, 3}, {5, 16, 16, 2, 81}};
  for (const nas::StemShape& shape : stems) {
    nas::cuda::kBlocks = blocks[calls % 3];
    run_stem<float>(shape, calls % 2 == 0);
    run_stem<nas::cuda::Tf32>(shape, calls % 2 == 0);
    run_stem<nas::cuda::BFloat16>(shape, calls % 2 == 0);
    ++calls;
  }
  std::printf("%d calls of either direction\n", calls);
}
