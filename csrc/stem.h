// The stem of the supernet: a 3x3 convolution of the images and batch normalisation with scale and
// shift. What the kernels are given; see cell.h for how things lie.
//
// nas/ops/stem.py is the same in eager PyTorch.

#pragma once

#include "cell.h"

namespace nas {

// Methods are constexpr so that CUDA kernels can call them, too.
struct StemShape {
  int64_t images, height, width;
  int64_t inputs, outputs;  // channels

  constexpr int64_t taps() const { return 9 * inputs; }  // of one output: [row][column][input]
  constexpr int64_t pixels() const { return height * width; }
  // Offsets into the flat weights: filters [taps][outputs], scale, shift.
  constexpr int64_t scale() const { return taps() * outputs; }
  constexpr int64_t shift() const { return scale() + outputs; }
  constexpr int64_t weights() const { return shift() + outputs; }
};

// T is what the output is stored in, P everything else.
template <typename T, typename P = T>
struct StemForward {
  StemShape shape;
  bool training;              // normalise by the batch; else by `mean` and `variance`
  const P* images;            // [N, H, W, inputs]
  const P* weights;           // flat
  const P* running_mean;      // [outputs]
  const P* running_variance;
  T* output;                  // [N, H, W, outputs]
  P* convolution;             // likewise, before its normalisation: backward reads it again
  P* mean;                    // [outputs]; what was normalised by
  P* reciprocal_deviation;
  P* variance;                // unbiased, for the running variance
};

template <typename T, typename P = T>
struct StemBackward {
  StemShape shape;
  bool training;
  const P* images;
  const P* weights;
  const P* convolution;       // what the forward pass gave
  const P* mean;
  const P* reciprocal_deviation;
  const T* output_gradient;   // [N, H, W, outputs]
  P* weights_gradient;        // flat
};

}  // namespace nas
