// One cell of the DARTS or PC-DARTS supernet, forward and backward: what the kernels are given.
//
// Plain pointers and sizes, no torch: csrc/operators.cpp checks the tensors and fills these in.
// Images and gradients are dense [image][row][column][channel] ("channels last"). Shapes below
// write N images, H x W for the cell's inputs, h x w for its nodes (half of H x W, rounded up, in a
// reduction cell), C channels a state and c = C / K channels that the mixed operation sees.
//
// nas/ops/mixed.py is the same cell in eager PyTorch and the reference for every number here.

#pragma once

#include <cstdint>

namespace nas {

constexpr int kNodes = 4;
constexpr int kStates = 2 + kNodes;       // two inputs, four nodes
constexpr int kSources = kStates - 1;     // states that an edge leaves
constexpr int kEdges = 14;
constexpr int kReducing = 8;              // edges from the two inputs
constexpr int kOperations = 8;
constexpr int kConvolutions = 6;          // pointwise convolutions of an edge

enum Operation { kNone, kMaxPool, kAveragePool, kSkip, kSep3, kSep5, kDil3, kDil5 };

// Where an edge's convolutions stand in the packed tables.
enum Convolution { kSep3A, kSep3B, kSep5A, kSep5B, kDilated3, kDilated5 };

// Edges in their packed order: all edges into node 2, then into node 3, ...
constexpr int first_edge(int target) { return (target - 2) * (target + 1) / 2; }
constexpr int edge_of(int source, int target) { return first_edge(target) + source; }
// Position of an edge from an input (source 0 or 1) among the edges that reduce.
constexpr int reducing_slot(int source, int target) { return 2 * (target - 2) + source; }

// Methods are constexpr so that CUDA kernels can call them, too.
struct CellShape {
  int64_t images, height, width;                  // N, H, W: of `previous`
  int64_t before_height, before_width;            // of `before`: twice as large where it is halved
  int64_t before_channels, previous_channels;
  int64_t channels, partial;                      // C, K
  bool reduction, previous_reduction;

  constexpr int64_t mixed() const { return channels / partial; }
  constexpr int64_t node_height() const { return reduction ? (height + 1) / 2 : height; }
  constexpr int64_t node_width() const { return reduction ? (width + 1) / 2 : width; }

  // Offsets into the flat weights; nas/ops/mixed.py, CellPlan.weights, has the same order.
  constexpr int64_t preprocess(int which) const { return which ? before_channels * channels : 0; }
  constexpr int64_t depthwise3() const { return (before_channels + previous_channels) * channels; }
  constexpr int64_t depthwise5() const { return depthwise3() + kEdges * 3 * 9 * mixed(); }
  constexpr int64_t pointwise() const { return depthwise5() + kEdges * 3 * 25 * mixed(); }
  constexpr int64_t reduce() const {
    return pointwise() + kEdges * kConvolutions * mixed() * mixed();
  }
  constexpr int64_t weights() const {
    return reduce() + (reduction ? kReducing * mixed() * mixed() : 0);
  }

  // Offsets into the flat statistics; CellPlan.statistics has the same order.
  constexpr int64_t preprocess_statistics(int which) const { return which * channels; }
  constexpr int64_t pool_statistics(int source, int average) const {
    return 2 * channels + (2 * source + average) * mixed();
  }
  constexpr int64_t convolution_statistics(int edge, int convolution) const {
    return 2 * channels + (2 * kSources + edge * kConvolutions + convolution) * mixed();
  }
  constexpr int64_t reduce_statistics(int slot) const {
    return 2 * channels + (2 * kSources + kEdges * kConvolutions + slot) * mixed();
  }
  constexpr int64_t statistics() const { return reduce_statistics(reduction ? kReducing : 0); }
};

// The upper half of a float's bits.
struct bfloat16 {
  uint16_t bits;
};

// T is what images are stored in. P, wider where T is half a float, is what parameters, statistics
// and their gradients are stored in.
template <typename T, typename P = T>
struct CellForward {
  CellShape shape;
  bool training;                       // normalise by the batch; else by `mean` and `variance`
  bool live[kEdges][kOperations];      // what is not live is not computed
  const T* before;                     // [N, 2H or H, 2W or W, before_channels]
  const T* previous;                   // [N, H, W, previous_channels]
  const P* weights;                    // flat, see CellShape
  const P* running_mean;               // flat, see CellShape
  const P* running_variance;
  const P* operations;                 // mixing weights [edges, operations]
  const P* bypass;                     // weights of the channels that pass an edge by [edges]
  T* output;                           // [N, h, w, 4 C]: the nodes side by side
  T* states;                           // [2, N, H, W, C]: the preprocessed inputs
  P* mean;                             // flat; what was normalised by
  P* reciprocal_deviation;             // 1 / sqrt(variance + epsilon)
  P* variance;                         // unbiased, for the running variance
  T* kept;                             // what backward reads again, or null where none will come
};

template <typename T, typename P = T>
struct CellBackward {
  CellShape shape;
  bool training;
  bool live[kEdges][kOperations];
  const T* before;
  const T* previous;
  const P* weights;
  const P* operations;
  const P* bypass;
  const T* output;                     // what the forward pass gave
  const T* states;
  const P* mean;
  const P* reciprocal_deviation;
  const T* kept;
  const T* output_gradient;            // [N, h, w, 4 C]
  T* before_gradient;                  // null: not asked for, and not paid for
  T* previous_gradient;                // null or not like before_gradient
  P* weights_gradient;                 // likewise
  P* operations_gradient;              // likewise [edges, operations]
  P* bypass_gradient;                  // likewise, with operations_gradient [edges]
  bool previous_begun;                 // previous_gradient holds a part of itself, and is added to
};

}  // namespace nas
