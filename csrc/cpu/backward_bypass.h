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

  // Undoes the shuffle of a node's gradient: the mixed channels go to `planes`, the others by the edges.
  // `inner` is what the edges that leave the node send back to its mixed channels, null for the last.
  void split_gradient(int target, int64_t block, const Vec<T>* inner, Sixteen<S>* planes,
                      int64_t thread) {
    const auto& g = shared_.geometry;
    if (!g.lanes.full(block)) {
      std::fill(planes, planes + g.per_block(g.node_pixels), Sixteen<S>{});
    }
    Vec<T> products[kStates];
    for (auto& product : products) product = Vec<T>::zero();
    const bool done = with_quarters(g, [&](auto vecs) {
      split_quarters<vecs>(target, block, inner, planes, products);
    });
    if (!done) split_rows(target, block, inner, planes, products, thread);
    if (inner) keep_products(target, block, products);
  }

  // Writes the gradient of an input's state [N, H, W, C]; `inner` are its mixed channels.
  void complete_input(int s, int64_t block, const Vec<T>* inner, S* to, int64_t thread) {
    const auto& g = shared_.geometry;
    Vec<T> products[kStates];
    for (auto& product : products) product = Vec<T>::zero();
    const bool done = g.stride(s) == 1 && with_quarters(g, [&](auto vecs) {
      input_quarters<vecs>(s, block, inner, to, products);
    });
    if (!done) {
      input_rows(s, block, to, products, thread);
      scatter(g.lanes, block, inner, g.pixels, g.pixels,
              Images<S>{to, g.pixels * g.shape.channels, g.shape.channels});
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
  // Where a node's gradient comes from.
  Images<const S> output_gradient(int target) const {
    const auto& g = shared_.geometry;
    const int64_t channels = g.shape.channels;
    return {shared_.call.output_gradient + (target - 2) * channels,
            g.node_pixels * kNodes * channels, kNodes * channels};
  }

  // Of 16 G channels a quarter mixed: calls f with how many edges leave state `s`, and whether they
  // are to be weighed.
  template <typename F>
  void with_edges(int s, F&& f) const {
    with_most<kNodes + 1>(kStates - std::max(2, s + 1) + 1, [&](auto more) {
      constexpr std::integral_constant<int, more - 1> edges;
      if (shared_.call.bypass_gradient) return f(edges, std::true_type{});
      f(edges, std::false_type{});
    });
  }
  template <int G>
  void split_quarters(int target, int64_t block, const Vec<T>* inner, Sixteen<S>* planes,
                      Vec<T>* products) const {
    using Pixel = Quarters<G, T>;
    const auto& g = shared_.geometry;
    const Vec<T> passes = PassedRow<T>(g, 0).mask;
    with_edges(target, [&](auto edges, auto weigh) {
      each_pixel<G, edges, weigh>(
          target, block, output_gradient(target), inner, products,
          [&](int64_t image, int64_t place, int64_t lane, const Vec<T>(&shuffled)[G]) NAS_INLINED {
            Vec<T> plain[G];
            Pixel::unshuffle(shuffled, plain);
            Pixel::store_mixed(plain[0], reinterpret_cast<S*>(planes + place) + lane);
            if (Pixel::kStart == 0) plain[0] = select(passes, plain[0]);
            S* to = rest_gradients_[target - 2] + (image * g.node_pixels + place) * G * kLanes;
            NAS_UNROLL for (int v = Pixel::kStart; v < G; ++v) {
              store_channels(plain[v], to + v * kLanes, kLanes);
            }
          });
    });
  }
  template <int G>
  void input_quarters(int s, int64_t block, const Vec<T>* inner, S* to, Vec<T>* products) const {
    const int64_t pixels = shared_.geometry.pixels;
    with_edges(s, [&](auto edges, auto weigh) {
      each_pixel<G, edges, weigh>(
          s, block, Images<const S>{nullptr, 0, 0}, inner, products,
          [&](int64_t image, int64_t place, int64_t, const Vec<T>(&pixel)[G]) NAS_INLINED {
            NAS_UNROLL for (int v = 0; v < G; ++v) {
              store_channels(pixel[v], to + ((image * pixels + place) * G + v) * kLanes, kLanes);
            }
          });
    });
  }
  // Gives take(image, place, lane, pixel) all channels of the gradient of a state's pixels, one after
  // the other: `own`, if there is one, what the edges that leave it let pass by sends back, and
  // `inner`. Adds to products[target] what that edge's weight gets.
  template <int G, int Edges, bool Weigh, typename Take>
  void each_pixel(int s, int64_t block, const Images<const S>& own, const Vec<T>* inner,
                  Vec<T>* products, Take&& take) const {
    using Pixel = Quarters<G, T>;
    const auto& g = shared_.geometry;
    const int first = std::max(2, s + 1);
    const Vec<T> passes = PassedRow<T>(g, 0).mask;
    const Images<const S> states =
        passing(g, s, shared_.call.states, shared_.call.output, pooled_);
    Vec<T> weight[Edges + 1], product[Edges + 1];
    for (int edge = 0; edge < Edges; ++edge) {
      weight[edge] = Vec<T>::splat(shared_.call.bypass[edge_of(s, first + edge)]);
      product[edge] = products[first + edge];
    }
    for (int64_t n = 0; n < g.lanes.images_of(block); ++n) {
      const int64_t image = block * g.lanes.together + n, lane = n * g.lanes.group;
      const S* state = states.at + image * states.image;
      const S* begun = own.at ? own.at + image * own.image : nullptr;
      const S* gradients[Edges + 1];
      for (int edge = 0; edge < Edges; ++edge) {
        gradients[edge] = rest_gradients_[first + edge - 2] + image * g.node_pixels * G * kLanes;
      }
      for (int64_t place = 0; place < g.node_pixels; ++place) {
        Vec<T> pixel[G];
        NAS_UNROLL for (int v = 0; v < G; ++v) {
          pixel[v] = Vec<T>::zero();
          if (v >= Pixel::kStart && Edges > 0) {
            const bool whole = v * kLanes >= Pixel::kMixed;
            Vec<T> value;
            if constexpr (Weigh) {
              const S* at = state + place * states.pixel + v * kLanes;
              prefetch(at + kAhead * states.pixel);
              value = load_channels(at, kLanes);
              if (!whole) value = select(passes, value);
            }
            NAS_UNROLL for (int edge = 0; edge < Edges; ++edge) {
              const S* at = gradients[edge] + (place * G + v) * kLanes;
              prefetch(at + kAhead * G * kLanes);
              const Vec<T> gradient = load_channels(at, kLanes);
              if constexpr (Weigh) product[edge] += gradient * value;
              pixel[v] += gradient * weight[edge];
            }
            if (!whole) pixel[v] = select(passes, pixel[v]);
          }
          if (begun) {
            const S* at = begun + place * own.pixel + v * kLanes;
            prefetch(at + kAhead * own.pixel);
            pixel[v] += load_channels(at, kLanes);
          }
        }
        if (Edges > 0) pixel[0] += Pixel::with_mixed(Vec<T>::zero(), inner[place], lane);
        take(image, place, lane, pixel);
      }
    }
    for (int edge = 0; edge < Edges; ++edge) products[first + edge] = product[edge];
  }

  // The same of any channels, row by row.
  void split_rows(int target, int64_t block, const Vec<T>* inner, Sixteen<S>* planes,
                  Vec<T>* products, int64_t thread) const {
    const auto& g = shared_.geometry;
    T* row = rows_ + thread * row_size_;
    const int64_t channels = g.shape.channels, mixed = g.lanes.channels, width = g.node_width;
    const Images<const S> from = output_gradient(target);
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
  }
  // All but the mixed channels, which are still zero.
  void input_rows(int s, int64_t block, S* to, Vec<T>* products, int64_t thread) const {
    const auto& g = shared_.geometry;
    const int64_t channels = g.shape.channels;
    T* row = rows_ + thread * row_size_;
    const PassedRow<T> passed_row(g, g.node_width);
    const Images<const S> none{nullptr, 0, 0};
    for (int64_t n = 0; n < g.lanes.images_of(block); ++n) {
      const int64_t image = block * g.lanes.together + n;
      const S* state = shared_.call.states + (s * g.shape.images + image) * g.pixels * channels;
      S* gradient = to + image * g.pixels * channels;
      if (g.stride(s) == 1) {
        for (int64_t y = 0; y < g.node_height; ++y) {
          send_back(s, image, y, none, products, gradient + y * g.node_width * channels);
        }
        continue;
      }
      if (shared_.call.bypass_gradient) {
        pool_passing(g, passed_row.start, state,
                     pooled_ + (s * g.shape.images + image) * g.node_pixels * channels);
      }
      for (int64_t y = 0; y < g.node_height; ++y) {
        send_back(s, image, y, none, products, row);
        unpool_row(g, passed_row.start, state, y, row, gradient);
      }
    }
  }

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
  void send_back(int s, int64_t image, int64_t y, Images<const S> own, Vec<T>* products,
                 U* to) const {
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
