// What the parts of a cell's backward pass share: planes of the whole batch, and how the gradient of a
// batch normalisation is made of sums over it:
//
//   dy = a g + d y + b,   a = w r,   d = -w r^3 <g, y - m> / M,   b = -w r <g, 1> / M - d m
//
// with w the mixing weight, r the reciprocal deviation, m the mean and M the numbers a channel.
// The products <g, y - m> r are the gradients of the mixing weights, too.

#pragma once

#include "edge.h"

namespace nas::NAS_ISA {

// A thread's own.
template <typename T>
struct Scratch {
  Vec<T>*rectified, *second, *padded, *gradient, *row;
};

template <typename S, typename T>
struct BackwardShared {
  const CellBackward<S, T>& call;
  const ThreadPool& pool;
  Geometry<T> geometry;
  Sixteen<S>* states[kSources];    // [block][group][pixel]
  Vec<T>* gradients[kSources];     // of the mixed channels of the states
  Sixteen<S>* nodes[kNodes];       // gradients of the mixed channels of the nodes
  Vec<T>* node_sums[kNodes];       // [block][group]
  double* node_totals[kNodes];     // [channel]
  double* product;                 // [channel], for sums of the moment

  BackwardShared(const CellBackward<S, T>& call, const ThreadPool& pool, Arena& arena)
      : call(call), pool(pool), geometry(call.shape) {
    const auto& g = geometry;
    for (int s = 0; s < kSources; ++s) {
      states[s] = arena.take<Sixteen<S>>(g.state_planes(s));
      gradients[s] = arena.take<Vec<T>>(g.state_planes(s));
    }
    for (auto& node : nodes) node = arena.take<Sixteen<S>>(g.node_planes());
    for (auto& sums : node_sums) sums = arena.take<Vec<T>>(g.lanes.blocks * g.lanes.groups);
    for (auto& totals : node_totals) totals = arena.take<double>(g.lanes.channels);
    product = arena.take<double>(g.lanes.channels);
    coefficients_ = arena.take<double>(3 * g.lanes.channels);
    scratch_size_ = g.rectified_size() + g.between(nullptr).size() +
                    4 * padded_gradient(nullptr, 0).size() + 2 * g.per_block(g.node_pixels) +
                    2 * g.lanes.groups * g.width + 2 * g.width;
    scratch_ = arena.take<Vec<T>>(pool.threads * scratch_size_);
  }

  void clear_scratch() const {  // all borders
    std::fill(scratch_, scratch_ + pool.threads * scratch_size_, Vec<T>::zero());
  }

  Scratch<T> scratch(int64_t thread) const {
    const auto& g = geometry;
    Scratch<T> s;
    s.rectified = scratch_ + thread * scratch_size_;
    s.second = s.rectified + g.rectified_size();
    s.padded = s.second + g.between(nullptr).size();
    s.gradient = s.padded + 4 * padded_gradient(nullptr, 0).size();
    s.row = s.gradient + 2 * g.per_block(g.node_pixels);
    return s;
  }
  // One for each of the convolutions that look at an edge's input.
  Padded<T> padded_gradient(Vec<T>* at, int which) const {
    const auto& g = geometry;
    const Padded<T> first{at, g.lanes.groups, g.node_height, g.node_width, kPadding};
    return {at + which * first.size(), first.groups, first.height, first.width, first.padding};
  }
  template <typename F>
  void for_blocks(int64_t chunk, F&& f) const {
    for (int64_t b = geometry.chunks.begin(chunk); b < geometry.chunks.end(chunk); ++b) f(b);
  }
  void clear_gradient(int s, int64_t block) const {
    const int64_t size = geometry.per_block(geometry.state_pixels(s));
    std::fill(gradients[s] + block * size, gradients[s] + (block + 1) * size, Vec<T>::zero());
  }
  int64_t node_block(int64_t block) const {
    return block * geometry.per_block(geometry.node_pixels);
  }
  Vec<T> mean(int64_t at, int64_t group) const {
    return in_lanes<T>(geometry.lanes, call.mean + at, group);
  }
  int64_t statistics(int source, int target, int convolution) const {
    return call.shape.convolution_statistics(edge_of(source, target), convolution);
  }
  T weight(int edge, int operation) const {
    return call.operations[edge * kOperations + operation];
  }

  // a, d and b of the formula at the top, in lanes: [a, d, b][group].
  void store_coefficients(double weight, int64_t at, const double* sum, const double* product,
                          Vec<T>* to) const {
    const auto& g = geometry;
    const int64_t channels = g.lanes.channels;
    const double each = call.training ? 1.0 / double(g.shape.images * g.node_pixels) : 0.0;
    for (int64_t c = 0; c < channels; ++c) {
      const double r = double(call.reciprocal_deviation[at + c]);
      const double a = weight * r, d = -a * r * r * product[c] * each;
      coefficients_[c] = a;
      coefficients_[channels + c] = d;
      coefficients_[2 * channels + c] = -a * sum[c] * each - d * double(call.mean[at + c]);
    }
    for (int part = 0; part < 3; ++part) {
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        to[part * g.lanes.groups + group] =
            in_lanes<T>(g.lanes, coefficients_ + part * channels, group);
      }
    }
  }

  // A block of the gradient of a node, for gradient_of().
  static auto read(const Sixteen<S>* gradient) {
    return [gradient](int64_t i) NAS_INLINED {
      prefetch(gradient + i + 2 * kAhead);
      return widen(gradient[i]);
    };
  }

  // dy of the formula at the top, for rows of one block: [group][pixel]. gradient(i) gives the block's
  // i-th Vec of g. Lanes of missing images stay zero.
  template <typename Gradient>
  void gradient_of(const Vec<T>* coefficients, int64_t block, Gradient&& gradient,
                   const Sixteen<S>* planes, int64_t first, int64_t pixels, Vec<T>* to) const {
    const auto& g = geometry;
    for (int64_t group = 0; group < g.lanes.groups; ++group) {
      const Vec<T>* at = coefficients + group;
      const Vec<T> a = without_missing(g.lanes, block, at[0]);
      const Vec<T> d = without_missing(g.lanes, block, at[g.lanes.groups]);
      const Vec<T> b = without_missing(g.lanes, block, at[2 * g.lanes.groups]);
      const int64_t start = group * g.node_pixels + first;
      const Sixteen<S>* plane = planes + start;
      if (!call.training) {  // d and b are zero, which would make NaN of infinity
        for (int64_t x = 0; x < pixels; ++x) to[group * pixels + x] = a * gradient(start + x);
        continue;
      }
      for (int64_t x = 0; x < pixels; ++x) {
        prefetch(plane + x + 2 * kAhead);
        to[group * pixels + x] = a * gradient(start + x) + (d * widen(plane[x]) + b);
      }
    }
  }

 private:
  double* coefficients_;
  int64_t scratch_size_;
  Vec<T>* scratch_;
};

}  // namespace nas::NAS_ISA
