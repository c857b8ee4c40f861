// The end of a backward pass: through the convolutions that made the states of the inputs. With the
// launches that they share with the nodes' part.

#pragma once

#include "backward_memory.cuh"
#include "collect.cuh"

namespace nas::cuda {

template <typename T, typename P>
SettlePairs<P> settle_for(const CellBackward<T, P>& call, int chunks, int channels, double numbers,
                          bool normalised) {
  SettlePairs<P> settle{};
  settle.chunks = chunks;
  settle.channels = channels;
  settle.numbers = numbers;
  settle.training = call.training;
  settle.normalised = normalised;
  settle.mean = call.mean;
  settle.scale = call.reciprocal_deviation;
  return settle;
}
template <typename P>
void run_settle(const SettlePairs<P>& settle, Stream stream) {
  launch(settle_pairs<P>,
         {unsigned(divide_up(settle.channels, kThreads / 32)), unsigned(settle.count), 1}, 0,
         stream, settle);
}

// What is left for `added` goes to `weights_gradient` + to[job].
template <int V, typename T>
void run_pointwise_back(PointwiseBack<T>& work, Sum<T>* weights_gradient, const int64_t* to,
                        AddChunks<Sum<T>>& added, Stream stream) {
  if (!work.count) return;
  int inputs = 1, outputs = 1;
  for (int i = 0; i < work.count; ++i) {
    inputs = larger(inputs, work.job[i].inputs);
    outputs = larger(outputs, work.job[i].outputs);
  }
  work.rows = pointwise_rows(inputs, outputs);
  Sum<T>*in, *back, *out, *staged;
  int64_t bytes;
  while ((bytes = work.take(Arena(nullptr), &in, &back, &out, &staged)) > kSharedBytes) {
    if (work.rows == 1) throw std::invalid_argument("a cell has too many channels for a GPU");
    work.rows /= 2;
  }
  const int chunks = chunks_for(divide_up(work.pixels, work.rows), work.count);
  int64_t used = 0;
  for (int i = 0; i < work.count; ++i) {
    const int64_t size = int64_t(work.job[i].inputs) * work.job[i].outputs;
    work.matrices_at[i] = used;
    if (work.matrices) added.add(work.matrices + used, weights_gradient + to[i], chunks, size);
    used += chunks * size;
  }
  launch(pointwise_back<T, V>, {unsigned(chunks), unsigned(work.count), 1}, bytes, stream, work);
}

// The sums of all blocks, of the weights' gradients since `added` was emptied.
template <typename P>
void add_up(const AddChunks<P>& added, Stream stream) {
  if (!added.jobs) return;
  launch(add_chunks<P>, {unsigned(divide_up(added.most, kThreads)), unsigned(added.jobs), 1}, 0,
         stream, added);
}

template <typename T, int V>
class InputsBack {
 public:
  using P = Sum<T>;

  InputsBack(const CellBackward<T, P>& call, const BackwardMemory<T>& memory, Stream stream)
      : call_(call), memory_(memory), g_{call.shape}, stream_(stream) {}

  // From memory.inputs, which is complete.
  void run() {
    const int chunks = chunks_for(divide_up(numbers(), kNumbers), 2);
    launch(state_pairs<T, V>, {unsigned(chunks), 2, 1}, pairs_bytes<P>(channels(), V), stream_, g_,
           call_.states, (const P*)memory_.inputs, memory_.sums);
    SettlePairs<P> settle =
        settle_for(call_, chunks, channels(), double(g_.input_pixels()), true);
    for (int which = 0; which < 2; ++which) {
      settle.job[settle.count++] = {memory_.sums + int64_t(which) * chunks * 2 * channels(),
                                    call_.shape.preprocess_statistics(which),
                                    memory_.input_coefficients + which * 3 * channels()};
    }
    run_settle(settle, stream_);
    AddChunks<P> added;
    for (int which = 0; which < 2; ++which) run(which, added);
    add_up(added, stream_);
  }

 private:
  int channels() const { return int(call_.shape.channels); }
  int64_t numbers() const { return g_.input_pixels() * channels(); }

  void run(int which, AddChunks<P>& added) {
    const CellShape& shape = call_.shape;
    T* gradient = which ? call_.previous_gradient : call_.before_gradient;
    if (!gradient && !call_.weights_gradient) return;
    PointwiseBack<T> work;
    work.pixels = g_.input_pixels();
    work.count = 1;
    work.job[0] = preprocessing(shape, call_.before, call_.previous, call_.weights, which);
    work.gradient[0] = memory_.inputs + which * numbers();
    work.plane[0] = call_.states + which * numbers();
    work.coefficients[0] = memory_.input_coefficients + which * 3 * channels();
    work.write[0] = gradient;
    work.begun = which && call_.previous_begun;
    work.add[0] = nullptr;
    work.matrices = call_.weights_gradient ? memory_.preprocess[which] : nullptr;
    if (gradient && work.job[0].halves == 2) {  // pixels that neither half sees
      clear(gradient,
            shape.images * shape.before_height * shape.before_width * shape.before_channels *
                int64_t(sizeof(T)),
            stream_);
    }
    const int64_t to = shape.preprocess(which);
    run_pointwise_back<V>(work, call_.weights_gradient, &to, added, stream_);
  }

  const CellBackward<T, P>& call_;
  const BackwardMemory<T>& memory_;
  Geometry g_;
  Stream stream_;
};

}  // namespace nas::cuda
