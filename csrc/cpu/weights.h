// A cell's weights in the order that the kernels read them, and gradients on the way back.

#pragma once

#include "layout.h"

namespace nas::NAS_ISA {

constexpr int kTaps = 3 * (9 + 25);  // of an edge's depthwise convolutions

// What one depthwise convolution of an edge is called in the packed tables.
struct DepthwiseSlot {
  int size, stage;

  int64_t offset() const { return size == 3 ? stage * 9 : 27 + stage * 25; }  // in taps of an edge
  int64_t source(const CellShape& shape, int edge) const {
    const int64_t taps = size * size;
    return (size == 3 ? shape.depthwise3() : shape.depthwise5()) +
           (edge * 3 + stage) * taps * shape.mixed();
  }
};
inline DepthwiseSlot depthwise_slot(int convolution) {
  switch (convolution) {
    case kSep3A: return {3, 0};
    case kSep3B: return {3, 1};
    case kDilated3: return {3, 2};
    case kSep5A: return {5, 0};
    case kSep5B: return {5, 1};
    default: return {5, 2};
  }
}

// Weights [in][out] as product_row reads them: [group of outputs][in] of Vec.
template <typename T>
void pack_matrix(const T* from, int64_t in, int64_t out, Vec<T>* to) {
  for (int64_t o = 0; o < out; o += kLanes) {
    for (int64_t i = 0; i < in; ++i) {
      to[o / kLanes * in + i] = load_channels(from + i * out + o, out - o);
    }
  }
}
template <typename T>
void pack_transposed(const T* from, int64_t in, int64_t out, Vec<T>* to) {
  for (int64_t i = 0; i < in; i += kLanes) {
    T* lanes = reinterpret_cast<T*>(to + i / kLanes * out);
    const int64_t count = std::min<int64_t>(kLanes, in - i);
    if (count < kLanes) std::fill(lanes, lanes + out * kLanes, T(0));
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t k = 0; k < count; ++k) lanes[o * kLanes + k] = from[(i + k) * out + o];
    }
  }
}

// A cell's mixed-operation weights. `Edge` counts Vecs.
template <typename T>
class EdgeWeights {
 public:
  // `plain` for convolutions, `transposed` for their gradients.
  EdgeWeights(const CellShape& shape, const Layout& layout, Arena& arena, bool plain,
              bool transposed)
      : shape_(shape), layout_(layout), pointwise_{layout.group, layout.groups, layout.channels} {
    const int64_t matrices = kEdges * kConvolutions * pointwise_.weights();
    const int64_t halves = kReducing * 2 * pointwise_.weights();
    taps_ = arena.take<Vec<T>>(kEdges * kTaps * layout.groups);
    if (plain) {
      matrices_ = arena.take<Vec<T>>(matrices);
      reduce_ = arena.take<Vec<T>>(halves);
    }
    if (transposed) {
      transposed_ = arena.take<Vec<T>>(matrices);
      reduce_transposed_ = arena.take<Vec<T>>(halves);
    }
  }

  const Pointwise<T>& pointwise() const { return pointwise_; }
  // [group][taps]
  const Vec<T>* taps(int edge, int convolution) const {
    return taps_ + (edge * kTaps + depthwise_slot(convolution).offset()) * layout_.groups;
  }
  const Vec<T>* matrix(int edge, int convolution) const {
    return matrices_ + (edge * kConvolutions + convolution) * pointwise_.weights();
  }
  const Vec<T>* transposed(int edge, int convolution) const {
    return transposed_ + (edge * kConvolutions + convolution) * pointwise_.weights();
  }
  const Vec<T>* reduce(int slot, int odd) const {
    return reduce_ + (slot * 2 + odd) * pointwise_.weights();
  }
  const Vec<T>* reduce_transposed(int slot, int odd) const {
    return reduce_transposed_ + (slot * 2 + odd) * pointwise_.weights();
  }

  // Packs one edge; edges are independent of each other.
  void pack(const T* weights, int edge, int source, int target) {
    const int64_t c = shape_.mixed();
    for (int convolution = 0; convolution < kConvolutions; ++convolution) {
      const DepthwiseSlot slot = depthwise_slot(convolution);
      const int taps = slot.size * slot.size;
      auto* to = const_cast<Vec<T>*>(this->taps(edge, convolution));
      for (int64_t g = 0; g < layout_.groups; ++g) {
        for (int tap = 0; tap < taps; ++tap) {
          to[g * taps + tap] =
              in_lanes<T>(layout_, weights + slot.source(shape_, edge) + tap * c, g);
        }
      }
      const T* from = weights + shape_.pointwise() + (edge * kConvolutions + convolution) * c * c;
      if (matrices_) pack_square(from, 0, c, matrix(edge, convolution), false);
      if (transposed_) pack_square(from, 0, c, transposed(edge, convolution), true);
    }
    if (shape_.reduction && source < 2) {
      // Each half of the outputs sees the even or the odd pixels: zeros elsewhere.
      const int slot = reducing_slot(source, target);
      const T* from = weights + shape_.reduce() + slot * c * c;
      const int64_t half = c / 2;
      if (matrices_) {
        pack_square(from, 0, half, reduce(slot, 0), false);
        pack_square(from, half, c, reduce(slot, 1), false);
      }
      if (transposed_) {
        pack_square(from, 0, half, reduce_transposed(slot, 0), true);
        pack_square(from, half, c, reduce_transposed(slot, 1), true);
      }
    }
  }

 private:
  // Columns first..last of a [c][c] matrix, the others zero, for either layout of the lanes.
  void pack_square(const T* from, int64_t first, int64_t last, const Vec<T>* packed, bool turn) {
    auto* to = const_cast<Vec<T>*>(packed);
    const int64_t c = shape_.mixed(), inputs = pointwise_.inputs();
    if (last - first == c && c % kLanes == 0) {
      if (turn) return pack_transposed(from, c, c, to);
      return pack_matrix(from, c, c, to);
    }
    for (int64_t g = 0; g < layout_.groups; ++g) {
      for (int64_t i = 0; i < inputs; ++i) {
        alignas(64) T lanes[kLanes] = {};
        for (int64_t k = 0; i < c && k < layout_.channels_of(g); ++k) {
          const int64_t o = g * kLanes + k;
          const int64_t column = turn ? i : o;
          if (column < first || column >= last) continue;
          const T value = from[turn ? o * c + i : i * c + o];
          for (int64_t n = 0; n < layout_.together; ++n) lanes[n * layout_.group + k] = value;
        }
        to[g * inputs + i] = Vec<T>::load(lanes);
      }
    }
  }

  CellShape shape_;
  Layout layout_;
  Pointwise<T> pointwise_;
  Vec<T>* taps_ = nullptr;
  Vec<T>* matrices_ = nullptr;
  Vec<T>* reduce_ = nullptr;
  Vec<T>* transposed_ = nullptr;
  Vec<T>* reduce_transposed_ = nullptr;
};

// Gradients of one edge's weights, chunk by chunk of the batch, and on their way back to the order of
// the parameters.
template <typename T>
class EdgeWeightGradients {
 public:
  EdgeWeightGradients(const CellShape& shape, const Layout& layout, const Chunks& chunks,
                      Arena& arena)
      : shape_(shape), layout_(layout), chunks_(chunks.count),
        pointwise_{layout.group, layout.groups, layout.channels} {
    taps_ = arena.take<Vec<T>>(chunks_ * kTaps * layout.groups);
    matrices_ = arena.take<Vec<T>>(chunks_ * (kConvolutions + 2) * pointwise_.weights());
  }

  // [group][taps]
  Vec<T>* taps(int64_t chunk, int convolution) const {
    return taps_ + (chunk * kTaps + depthwise_slot(convolution).offset()) * layout_.groups;
  }
  // Beyond the convolutions: the two halves of a skip connection that reduces.
  Vec<T>* matrix(int64_t chunk, int convolution) const {
    return matrices_ + (chunk * (kConvolutions + 2) + convolution) * pointwise_.weights();
  }
  void clear(int64_t chunk) {
    std::fill(taps(chunk, kSep3A), taps(chunk + 1, kSep3A), Vec<T>::zero());
    std::fill(matrix(chunk, 0), matrix(chunk + 1, 0), Vec<T>::zero());
  }

  // The sums over all chunks of one convolution, or, after the last, of the skip connection that
  // reduces, if it is live.
  void unpack(int source, int target, int convolution, bool live_skip, T* gradients) const {
    const int64_t c = shape_.mixed();
    const int edge = edge_of(source, target);
    if (convolution < kConvolutions) {
      unpack_taps(edge, convolution, gradients);
      unpack_matrix(convolution, 0, c,
                    gradients + shape_.pointwise() + (edge * kConvolutions + convolution) * c * c);
    } else if (shape_.reduction && source < 2) {
      T* to = gradients + shape_.reduce() + reducing_slot(source, target) * c * c;
      if (!live_skip) return std::fill(to, to + c * c, T(0));
      unpack_matrix(kConvolutions, 0, c / 2, to);
      unpack_matrix(kConvolutions + 1, c / 2, c, to);
    }
  }

 private:
  template <typename At>
  Vec<T> over_chunks(At&& at) const {
    Vec<T> total = at(0);
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) total += at(chunk);
    return total;
  }

  void unpack_taps(int edge, int convolution, T* gradients) const {
    const int64_t c = shape_.mixed();
    const DepthwiseSlot slot = depthwise_slot(convolution);
    const int count = slot.size * slot.size;
    T* to = gradients + slot.source(shape_, edge);
    std::fill(to, to + count * c, T(0));
    for (int64_t group = 0; group < layout_.groups; ++group) {
      for (int tap = 0; tap < count; ++tap) {
        const Vec<T> total = over_chunks(
            [&](int64_t chunk) { return taps(chunk, convolution)[group * count + tap]; });
        add_lanes(layout_, layout_.together, group, total, to + tap * c);
      }
    }
  }

  // Columns first..last of [c][c].
  void unpack_matrix(int which, int64_t first, int64_t last, T* to) const {
    const int64_t c = shape_.mixed(), inputs = pointwise_.inputs();
    for (int64_t group = 0; group < layout_.groups; ++group) {
      for (int64_t in = 0; in < c; ++in) {
        const Vec<T> total = over_chunks(
            [&](int64_t chunk) { return matrix(chunk, which)[group * inputs + in]; });
        T values[kLanes] = {};
        add_lanes(layout_, layout_.together, 0, total, values);
        for (int64_t o = 0; o < layout_.channels_of(group); ++o) {
          const int64_t column = group * kLanes + o;
          if (column >= first && column < last) to[in * c + column] = values[o];
        }
      }
    }
  }

  CellShape shape_;
  Layout layout_;
  int64_t chunks_;
  Pointwise<T> pointwise_;
  Vec<T>* taps_;
  Vec<T>* matrices_;
};

}  // namespace nas::NAS_ISA
