// PC-DARTS, forward: what passes the edges by, and its shuffle with what they give.

#pragma once

#include "bypass.h"

namespace nas::NAS_ISA {

template <typename S, typename T>
class BypassForward {
 public:
  BypassForward(const CellForward<S, T>& call, const Geometry<T>& geometry, const ThreadPool& pool,
                Arena& arena)
      : call_(call), geometry_(geometry) {
    const auto& g = geometry;
    const bool passes = g.shape.partial > 1, halves = passes && g.shape.reduction;
    passed_size_ = passes ? g.node_width * g.shape.channels : 0;
    passed_ = arena.take<S>(pool.threads * passed_size_);
    mixed_size_ = passes && kRounded<S, T> ? g.lanes.groups * g.node_width : 0;
    mixed_ = arena.take<Sixteen<S>>(pool.threads * mixed_size_);
    pooled_ = arena.take<S>(halves ? 2 * g.shape.images * g.node_pixels * g.shape.channels : 0);
  }

  // What passes from a block of an input under stride 2.
  void pool_input(int s, int64_t block, const Images<const S>& from) const {
    const auto& g = geometry_;
    const PassedRow<T> passed_row(g, g.node_width);
    for (int64_t n = 0; n < g.lanes.images_of(block); ++n) {
      const int64_t image = block * g.lanes.together + n;
      pool_passing(g, passed_row.start, from.at + image * from.image,
                   pooled_ + (s * g.shape.images + image) * g.node_pixels * g.shape.channels);
    }
  }

  // One row of a node: its mixed channels [group][pixel], those that pass by, and their shuffle. As a
  // state the node has its first channels in `state`, unless that is null.
  void write_row(int target, int64_t block, int64_t y, const Vec<T>* row, Images<S> node,
                 Sixteen<S>* state, int64_t thread) const {
    const auto& g = geometry_;
    const bool done = with_quarters(g, [&](auto vecs) {
      with_most<kSources>(target, [&](auto edges) {
        write_quarters<vecs, edges>(block, y, row, call_.bypass + first_edge(target), node, state);
      });
    });
    if (done) return;
    shuffle_row(target, block, y, row, node, thread);
    if (!state) return;
    gather(g.lanes, block,
           Images<const S>{node.at, node.image, node.pixel}.skip(y * g.node_width), g.node_width,
           state, g.node_pixels);
  }

 private:
  // Of one image, from row `y` of a node on, what the states before it let pass.
  void find_passing(int target, int64_t image, int64_t y, Images<const S>* from) const {
    for (int s = 0; s < target; ++s) {
      from[s] = passing(geometry_, s, call_.states, call_.output, pooled_);
      from[s].at += image * from[s].image + y * geometry_.node_width * from[s].pixel;
    }
  }

  // Of 16 G channels a quarter mixed.
  template <int G, int Edges>
  void write_quarters(int64_t block, int64_t y, const Vec<T>* row, const T* weights, Images<S> node,
                      Sixteen<S>* state) const {
    using Pixel = Quarters<G, T>;
    const auto& g = geometry_;
    Vec<T> weight[Edges];
    NAS_UNROLL for (int edge = 0; edge < Edges; ++edge) weight[edge] = Vec<T>::splat(weights[edge]);
    if (state && !g.lanes.full(block)) std::fill(state, state + g.node_width, Sixteen<S>{});
    for (int64_t n = 0; n < g.lanes.images_of(block); ++n) {
      const int64_t image = block * g.lanes.together + n, lane = n * g.lanes.group;
      Images<const S> from[Edges];
      find_passing(Edges, image, y, from);
      S* to = node.at + image * node.image + y * g.node_width * node.pixel;
      for (int64_t x = 0; x < g.node_width; ++x) {
        Vec<T> plain[G], shuffled[G];
        NAS_UNROLL for (int v = 0; v < G; ++v) {
          plain[v] = Vec<T>::zero();
          if (v < Pixel::kStart) continue;
          NAS_UNROLL for (int edge = 0; edge < Edges; ++edge) {
            const S* value = from[edge].at + x * from[edge].pixel + v * kLanes;
            prefetch(value + kAhead * from[edge].pixel);
            plain[v] += weight[edge] * load_channels(value, kLanes);
          }
        }
        plain[0] = Pixel::with_mixed(plain[0], row[x], lane);
        Pixel::shuffle(plain, shuffled);
        NAS_UNROLL for (int v = 0; v < G; ++v) {
          store_channels(shuffled[v], to + x * node.pixel + v * kLanes, kLanes);
        }
        if (state) Pixel::store_mixed(shuffled[0], reinterpret_cast<S*>(state + x) + lane);
      }
    }
  }

  // Of any channels.
  void shuffle_row(int target, int64_t block, int64_t y, const Vec<T>* row, Images<S> node,
                   int64_t thread) const {
    const auto& g = geometry_;
    const auto [mixed_row, plane] = stored_row(row, mixed_ + thread * mixed_size_);
    S* passed = passed_ + thread * passed_size_;
    const int64_t mixed = g.lanes.channels;
    const PassedRow<T> passed_row(g, g.node_width);
    Images<const S> from[kSources];
    for (int64_t n = 0; n < g.lanes.images_of(block); ++n) {
      const int64_t image = block * g.lanes.together + n;
      find_passing(target, image, y, from);
      with_most<kSources>(target, [&](auto edges) {
        passed_row.template add_up<edges>(from, call_.bypass + first_edge(target), passed);
      });
      S* to = node.at + image * node.image + y * g.node_width * node.pixel;
      for (int64_t x = 0; x < g.node_width; ++x) {
        const S* lanes = reinterpret_cast<const S*>(mixed_row + x) + n * g.lanes.group;
        shuffle(lanes, plane * kLanes, passed + x * g.shape.channels, mixed, g.shape.partial,
                to + x * node.pixel);
      }
    }
  }

  // A row of a node as memory holds it, and how far its groups are apart.
  std::pair<const Sixteen<S>*, int64_t> stored_row(const Vec<T>* row, Sixteen<S>* spare) const {
    const auto& g = geometry_;
    if constexpr (!kRounded<S, T>) {
      return {row, g.node_pixels};
    } else {
      for (int64_t group = 0; group < g.lanes.groups; ++group) {
        rounded<S>(row + group * g.node_pixels, g.node_width, spare + group * g.node_width);
      }
      return {spare, g.node_width};
    }
  }

  const CellForward<S, T>& call_;
  const Geometry<T>& geometry_;
  int64_t passed_size_, mixed_size_;
  S* passed_;            // a thread's own: a row of what passes
  Sixteen<S>* mixed_;    // a thread's own: a row of a node, rounded
  S* pooled_;            // what passes from the inputs under stride 2 [2, N, h, w, C]
};

}  // namespace nas::NAS_ISA
