// PC-DARTS: the way back through the shuffle and along the channels that pass the edges by.

#pragma once

#include "backward_shared.h"
#include "bypass.h"

namespace nas::NAS_ISA {

template <typename S, typename T>
class BypassBackward {
 public:
  BypassBackward(const BackwardShared<S, T>& shared, Arena& arena) : shared_(shared) {
    const auto& g = shared.geometry;
    const bool passes = g.shape.partial > 1, halves = passes && g.shape.reduction;
    const int64_t numbers = g.shape.images * g.node_pixels * g.shape.channels;
    sums_ = arena.take<Vec<T>>(kEdges * g.lanes.blocks);
    for (auto& node : rest_gradients_) node = arena.take<S>(passes ? numbers : 0);
    row_size_ = passes ? g.node_width * g.shape.channels : 0;
    rows_ = arena.take<T>(shared.pool.threads * row_size_);
    rounded_ = arena.take<S>(kRounded<S, T> ? shared.pool.threads * row_size_ : 0);
    pooled_ = arena.take<S>(halves ? 2 * numbers : 0);
  }

  // Undoes the shuffle; the mixed channels go on, the others go by the edges.
  void split_gradient(int target, int64_t block, const Vec<T>* inner, Sixteen<S>* planes,
                      int64_t thread) {
    const auto& g = shared_.geometry;
    T* row = rows_ + thread * row_size_;
    const int64_t channels = g.shape.channels, mixed = g.lanes.channels, width = g.node_width;
    const Images<const S> from{shared_.call.output_gradient + (target - 2) * channels,
                               g.node_pixels * kNodes * channels, kNodes * channels};
    if (!g.lanes.full(block)) {
      std::fill(planes, planes + g.per_block(g.node_pixels), Sixteen<S>{});
    }
    Vec<T> products[kStates];
    for (auto& product : products) product = Vec<T>::zero();
    for (int64_t n = 0; n < g.lanes.images_of(block); ++n) {
      const int64_t image = block * g.lanes.together + n;
      for (int64_t y = 0; y < g.node_height; ++y) {
        Images<const S> gradient = from.skip(y * width);
        gradient.at += image * from.image;
        if (inner) {
          send_back(target, image, y, gradient, products, row);
          add_channels(g.lanes, inner + y * width, g.node_pixels, n, width, row, channels);
          gradient = {stored_row(row, rounded_ + thread * row_size_), 0, channels};
        }
        for (int64_t x = 0; x < width; ++x) {
          const int64_t place = y * width + x;
          unshuffle(gradient.at + x * gradient.pixel, mixed, g.shape.partial,
                    reinterpret_cast<S*>(planes + place) + n * g.lanes.group,
                    g.node_pixels * kLanes,
                    rest_gradients_[target - 2] + (image * g.node_pixels + place) * channels);
        }
      }
    }
    if (inner) keep_products(target, block, products);
  }

  // Writes all channels of the gradient of an input's state: the mixed ones are still zero.
  void complete_input(int s, int64_t block, int64_t thread, S* to) {
    const auto& g = shared_.geometry;
    const int64_t channels = g.shape.channels;
    T* row = rows_ + thread * row_size_;
    const PassedRow<T> passed_row(g, g.node_width);
    Vec<T> products[kStates];
    for (auto& product : products) product = Vec<T>::zero();
    for (int64_t n = 0; n < g.lanes.images_of(block); ++n) {
      const int64_t image = block * g.lanes.together + n;
      const S* state = shared_.call.states + (s * g.shape.images + image) * g.pixels * channels;
      S* gradient = to + image * g.pixels * channels;
      const bool halved = g.stride(s) == 2;
      S* pooled = pooled_ + (s * g.shape.images + image) * g.node_pixels * channels;
      if (halved) pool_passing(g, passed_row.start, state, pooled);
      for (int64_t y = 0; y < g.node_height; ++y) {
        const Images<const S> none{nullptr, 0, 0};
        if (halved) {
          send_back(s, image, y, none, products, row);
          unpool_row(g, passed_row.start, state, y, row, gradient);
        } else {
          send_back(s, image, y, none, products, gradient + y * g.node_width * channels);
        }
      }
    }
    keep_products(s, block, products);
  }

  // The gradient of the edge weights.
  void merge() {
    const auto& g = shared_.geometry;
    for (int edge = 0; edge < kEdges; ++edge) {
      double total = 0;
      for (int64_t block = 0; g.shape.partial > 1 && block < g.lanes.blocks; ++block) {
        total += double(sum(sums_[edge * g.lanes.blocks + block], 0, kLanes));
      }
      shared_.call.bypass_gradient[edge] = T(total);
    }
  }

 private:
  // A row of pixels [w, C] as memory holds it.
  const S* stored_row(const T* row, S* spare) const {
    if constexpr (!kRounded<S, T>) {
      return row;
    } else {
      for (int64_t i = 0; i < row_size_; i += kLanes) {
        const int64_t count = row_size_ - i;
        store_channels(load_channels(row + i, count), spare + i, count);
      }
      return spare;
    }
  }

  // What the edges that leave state `s` let pass by sends back to a row of its pixels, added to
  // `own`; adds to products[target] what that edge's weight gets, if anybody asks for it.
  template <typename U>
  void send_back(int s, int64_t image, int64_t y, Images<const S> own, Vec<T>* products, U* to) {
    const auto& g = shared_.geometry;
    const int first = std::max(2, s + 1), count = kStates - first;
    const int64_t place = image * g.node_pixels + y * g.node_width;
    const S* gradients[kSources] = {};
    T weights[kSources] = {};
    for (int k = 0; k < count; ++k) {
      gradients[k] = rest_gradients_[first + k - 2] + place * g.shape.channels;
      weights[k] = shared_.call.bypass[edge_of(s, first + k)];
    }
    const bool weigh = shared_.call.bypass_gradient;
    Images<const S> state = passing(g, s, shared_.call.states, shared_.call.output, pooled_);
    state.at += image * state.image + y * g.node_width * state.pixel;
    const PassedRow<T> row(g, g.node_width);
    with_most<kNodes>(count, [&](auto edges) {
      if (weigh) {
        row.template send_back<edges, true>(gradients, weights, state, own, products + first, to);
      } else {
        row.template send_back<edges, false>(gradients, weights, state, own, products + first, to);
      }
    });
  }

  void keep_products(int s, int64_t block, const Vec<T>* products) {
    for (int target = std::max(2, s + 1); target < kStates; ++target) {
      sums_[edge_of(s, target) * shared_.geometry.lanes.blocks + block] = products[target];
    }
  }

  const BackwardShared<S, T>& shared_;
  Vec<T>* sums_;                // [edge][block]
  S* rest_gradients_[kNodes];   // of what passed the edges by [N, h, w, C]
  int64_t row_size_;
  T* rows_;                     // a thread's own
  S* rounded_;                  // what it holds, rounded
  S* pooled_;                   // what passes from the inputs under stride 2
};

}  // namespace nas::NAS_ISA
