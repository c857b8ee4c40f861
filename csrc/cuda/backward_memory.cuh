// What a backward pass computes in.

#pragma once

#include "forward.cuh"
#include "pointwise_gradient.cuh"

namespace nas::cuda {

// Pieces of the workspace. Planes and sums are of the wider numbers, which are added up in.
template <typename T>
struct BackwardMemory {
  using P = Sum<T>;

  int64_t bytes;                       // of the workspace
  int64_t state_at[kSources];          // of a state's mixed channels in states_gradient
  P* states_gradient;                  // from convolutions and skips; accumulated
  P* nodes;                            // gradients of the nodes' mixed channels
  P* rest;                             // of the others
  P* inputs;                           // of the preprocessed inputs, all channels
  T* pools[kSources];
  uint8_t* largest[kSources];
  P* pool_gradient;
  P* between;                          // see ConvolutionGradient
  T* unkept;                           // convolutions of a node's edges that were not kept
  P* depthwise;
  P* coefficients;
  P* reduced;
  P* input_coefficients;
  P* pool_coefficients;
  double* pooled;
  P* sums;                             // of blocks, for the launch that follows
  P* matrices[2] = {};                 // weight gradients of blocks, until the end of a node
  P* taps[2] = {};
  P* reductions = nullptr;
  P* preprocess[2] = {};

  BackwardMemory(const CellBackward<T, P>& call, void* workspace) {
    const Geometry g{call.shape};
    Arena arena(workspace);
    const int64_t plane = g.plane(), mixed = g.channels(), channels = call.shape.channels;
    const int64_t before = 2 * g.input_pixels() * mixed;  // numbers of both inputs
    for (int s = 0; s < kSources; ++s) {
      state_at[s] = s < 2 ? s * g.input_pixels() * mixed : before + (s - 2) * plane;
    }
    states_gradient = arena.template take<P>(numbers_of_states(g));
    nodes = arena.template take<P>(kNodes * plane);
    rest = arena.template take<P>(kNodes * g.node_pixels() * (channels - mixed));
    inputs = arena.template take<P>(2 * g.input_pixels() * channels);
    for (int s = 0; s < kSources; ++s) {
      pools[s] = arena.template take<T>(2 * plane);
      largest[s] = arena.template take<uint8_t>(plane);
    }
    pool_gradient = arena.template take<P>(2 * plane);
    between = arena.template take<P>(2 * kSources * plane);
    unkept = arena.template take<T>(g.unkept(kSources));
    depthwise = arena.template take<P>(4 * kSources * plane);
    coefficients = arena.template take<P>(kEdges * kConvolutions * 3 * mixed);
    reduced = arena.template take<P>(kReducing * 3 * mixed);
    input_coefficients = arena.template take<P>(2 * 3 * channels);
    pool_coefficients = arena.template take<P>(2 * 3 * mixed);
    pooled = arena.template take<double>(kEdges * 2 * 2 * mixed);
    sums = arena.template take<P>(most_blocks(g, kEdges) * kOperations * channels);
    if (call.weights_gradient) take_weights(g, arena);
    bytes = arena.used();
  }

  // Numbers of states_gradient.
  static int64_t numbers_of_states(const Geometry& g) {
    return 2 * g.input_pixels() * g.channels() + (kSources - 2) * g.plane();
  }

 private:
  void take_weights(const Geometry& g, Arena& arena) {
    const CellShape& shape = g.shape;
    const int64_t mixed = g.channels();
    const int together = shares_inputs(g.channels()) ? kFirst : 1;  // matrices of a block
    matrices[0] =
        arena.template take<P>(together * most_blocks(g, kFirst * kSources) * mixed * mixed);
    matrices[1] = arena.template take<P>(most_blocks(g, 2 * kSources) * mixed * mixed);
    taps[0] = arena.template take<P>(2 * most_blocks(g, kSources) * 2 * (9 + 25) * mixed);
    taps[1] = arena.template take<P>(most_blocks(g, 2 * kSources) * 25 * mixed);
    if (shape.reduction) reductions = arena.template take<P>(most_blocks(g, 2) * mixed * mixed);
    const int64_t inputs[2] = {shape.before_channels, shape.previous_channels};
    for (int which = 0; which < 2; ++which) {
      preprocess[which] =
          arena.template take<P>(most_blocks(g, 1) * inputs[which] * shape.channels);
    }
  }
  // Blocks of a launch with up to `jobs` jobs: chunks_for(units, jobs) * jobs is never more.
  static int64_t most_blocks(const Geometry& g, int jobs) {
    return smaller<int64_t>(kBlocks + jobs, jobs * larger(g.node_pixels(), g.input_pixels()));
  }
};

}  // namespace nas::cuda
