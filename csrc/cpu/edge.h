// What the forward pass and the recomputing backward pass of an edge share.

#pragma once

#include "layout.h"
#include "pool.h"
#include "separable.h"
#include "weights.h"

namespace nas::NAS_ISA {

// The convolutions that look at an edge's input, and the two that look at what they give.
struct Branch {
  Operation operation;
  int convolution;
  int size, dilation;
};
constexpr Branch kFirst[] = {{kSep3, kSep3A, 3, 1},
                             {kSep5, kSep5A, 5, 1},
                             {kDil3, kDilated3, 3, 2},
                             {kDil5, kDilated5, 5, 2}};
constexpr Branch kSecond[] = {{kSep3, kSep3B, 3, 1}, {kSep5, kSep5B, 5, 1}};

// The convolution that an operation ends with, whose normalised output is mixed.
constexpr int last_convolution(int operation) {
  constexpr int last[] = {kSep3B, kSep5B, kDilated3, kDilated5};
  return last[operation - kSep3];
}

constexpr int64_t kPadding = 4;  // of a rectified state: what a dilated 5x5 convolution needs

// A padded set of planes, [group][row][column]. Its border is zero from the start of a call, for
// only the inside is written.
template <typename T>
struct Padded {
  Vec<T>* at;
  int64_t groups, height, width, padding;

  int64_t pitch() const { return width + 2 * padding; }
  int64_t plane() const { return (height + 2 * padding) * pitch(); }
  int64_t size() const { return groups * plane(); }
  Vec<T>* row(int64_t g, int64_t y) const {
    return at + g * plane() + (y + padding) * pitch() + padding;
  }
  // The pixel that the first tap of output (0, 0) meets, for a convolution padded by `q`.
  const Vec<T>* first_tap(int64_t g, int64_t q) const { return row(g, -q) - q; }
};

// relu(planes) into the inside of `to`.
template <typename M, typename T>
void rectify(const M* planes, const Padded<T>& to) {
  for (int64_t g = 0; g < to.groups; ++g) {
    for (int64_t y = 0; y < to.height; ++y) {
      const M* from = planes + (g * to.height + y) * to.width;
      Vec<T>* row = to.row(g, y);
      for (int64_t x = 0; x < to.width; ++x) row[x] = relu<T>(widen(from[x]));
    }
  }
}

// relu of the normalised planes into the inside of `to`; scale and shift are one Vec a group.
template <typename M, typename T>
void normalise_and_rectify(const M* planes, const Vec<T>* scale, const Vec<T>* shift,
                           const Padded<T>& to) {
  for (int64_t g = 0; g < to.groups; ++g) {
    const Vec<T> factor = scale[g], offset = shift[g];
    for (int64_t y = 0; y < to.height; ++y) {
      const M* from = planes + (g * to.height + y) * to.width;
      Vec<T>* row = to.row(g, y);
      for (int64_t x = 0; x < to.width; ++x) row[x] = relu(widen(from[x]) * factor + offset);
    }
  }
}

// `count` rows of a depthwise convolution from row y on, into to [group][row][column], groups
// `plane` apart.
template <typename T>
void depthwise_rows(const Depthwise<T>& depthwise, const Padded<T>& in, const Vec<T>* taps,
                    int64_t y, int64_t count, int64_t width, Vec<T>* to, int64_t plane) {
  for (int64_t g = 0; g < in.groups; ++g) {
    const Vec<T>* from = in.first_tap(g, depthwise.padding());
    for (int64_t row = y; row < y + count; ++row) {
      depthwise.row(from + row * depthwise.stride * in.pitch(), in.pitch(),
                    taps + g * depthwise.taps(), to + g * plane + (row - y) * width, width, false);
    }
  }
}

// A depthwise and a pointwise convolution of one block, row by row. What the first gives goes to
// `between` [group][pixel] or, if that is null, stays in the nearest cache: `row` is scratch of
// [2][group][width]. After each row of `out`, on_row(y).
template <typename T, typename M, typename OnRow>
void convolve(const Depthwise<T>& depthwise, const Pointwise<T>& pointwise, const Padded<T>& in,
              const Vec<T>* taps, const Vec<T>* matrix, int64_t height, int64_t width,
              Vec<T>* row, std::type_identity_t<Vec<T>>* between, M* out, OnRow&& on_row) {
  const auto separable = choose_separable(depthwise, pointwise.channels);
  const int64_t plane = between ? height * width : width;
  for (int64_t y = 0; y < height; ++y) {
    write_rows(out + y * width, height * width, in.groups, width, row + in.groups * width,
               [&](Vec<T>* to, int64_t out_plane) {
                 Vec<T>* part = between ? between + y * width : separable ? nullptr : row;
                 if (separable) {
                   separable(in.first_tap(0, depthwise.padding()) +
                                 y * depthwise.stride * in.pitch(),
                             in.pitch(), taps, matrix, part, to, width);
                 } else {
                   depthwise_rows(depthwise, in, taps, y, 1, width, part, plane);
                   pointwise.row(part, plane, matrix, to, out_plane, width);
                 }
               });
    on_row(y);
  }
}

// Every second pixel of a rectified state, from (first, first): what one half of a factorised
// reduction sees. Beyond an odd edge lie zeros.
template <typename T>
void every_second(const Padded<T>& in, int64_t first, int64_t y, int64_t width, Vec<T>* row) {
  for (int64_t g = 0; g < in.groups; ++g) {
    const Vec<T>* from = in.row(g, 2 * y + first) + first;
    for (int64_t x = 0; x < width; ++x) row[g * width + x] = from[2 * x];
  }
}

// The stride-2 skip connection before its normalisation. `row` holds three times [group][width].
template <typename T, typename M, typename OnRow>
void reduce(const Pointwise<T>& pointwise, const Layout& layout, const Padded<T>& in,
            const Vec<T>* even, const Vec<T>* odd, int64_t height, int64_t width, Vec<T>* row,
            M* out, OnRow&& on_row) {
  Vec<T>* second = row + layout.groups * width;
  Vec<T>* spare = second + layout.groups * width;
  for (int64_t y = 0; y < height; ++y) {
    write_rows(out + y * width, height * width, layout.groups, width, spare,
               [&](Vec<T>* first, int64_t plane) {
                 every_second(in, 0, y, width, row);
                 pointwise.row(row, width, even, first, plane, width);
                 every_second(in, 1, y, width, row);
                 pointwise.row(row, width, odd, second, width, width);
                 for (int64_t g = 0; g < layout.groups; ++g) {
                   // no sum with zeros: what is NaN in one half stays there
                   const Vec<T> mask = channels_from<T>(layout, layout.channels / 2, g);
                   Vec<T>* to = first + g * plane;
                   for (int64_t x = 0; x < width; ++x) {
                     to[x] = select(mask, second[g * width + x], to[x]);
                   }
                 }
               });
    on_row(y);
  }
}

// Sizes of a cell and of its parts, shared by both directions.
template <typename T>
struct Geometry {
  CellShape shape;
  Layout lanes;         // of the mixed channels
  Layout wide;          // of all channels of a state, one image a block
  Chunks chunks;
  int64_t height, width, pixels;                 // of the inputs' states
  int64_t node_height, node_width, node_pixels;

  explicit Geometry(const CellShape& s)
      : shape(s), lanes(s.images, s.mixed()), wide(whole_images(s.images, s.channels)),
        chunks(lanes.blocks), height(s.height), width(s.width), pixels(height * width),
        node_height(s.node_height()), node_width(s.node_width()),
        node_pixels(node_height * node_width) {}
  int64_t state_height(int s) const { return s < 2 ? height : node_height; }
  int64_t state_width(int s) const { return s < 2 ? width : node_width; }
  int64_t state_pixels(int s) const { return s < 2 ? pixels : node_pixels; }
  int64_t stride(int s) const { return s < 2 && shape.reduction ? 2 : 1; }
  int64_t bypassing() const { return shape.channels - shape.mixed(); }
  // Vecs of the planes of one state or node over the whole batch.
  int64_t state_planes(int s) const { return lanes.blocks * lanes.groups * state_pixels(s); }
  int64_t node_planes() const { return lanes.blocks * lanes.groups * node_pixels; }
  int64_t per_block(int64_t pixels) const { return lanes.groups * pixels; }
  // A thread's rectified state; inputs and nodes of another size have each a place of their own,
  // since the border of one lies inside the other.
  Padded<T> rectified(Vec<T>* at, int s) const {
    const Padded<T> input{at, lanes.groups, height, width, kPadding};
    if (s < 2 || !shape.reduction) return input;
    return {at + input.size(), lanes.groups, node_height, node_width, kPadding};
  }
  int64_t rectified_size() const {
    const int64_t input = rectified(nullptr, 0).size();
    return shape.reduction ? input + rectified(nullptr, 2).size() : input;
  }
  Padded<T> between(Vec<T>* at) const {  // the input of a second convolution
    return {at, lanes.groups, node_height, node_width, 2};
  }
  int64_t first_image(int64_t chunk) const { return chunks.begin(chunk) * lanes.together; }
  int64_t last_image(int64_t chunk) const {
    return std::min(shape.images, chunks.end(chunk) * lanes.together);
  }
};

// What a forward pass keeps of its convolutions before their normalisation, in planes over the whole
// batch: those of each edge and of the skip connections that reduce. Where one Vec holds all
// channels of a pixel, products are cheap and planes are large: there backward finds only the first
// of two convolutions in a row, and computes the others again.
template <typename T>
struct Kept {
  int64_t planes;  // Vecs of one convolution
  bool all, reduction;

  explicit Kept(const Geometry<T>& g)
      : planes(g.node_planes()), all(g.lanes.groups > 1), reduction(g.shape.reduction) {}
  bool has(int convolution) const {
    return all || convolution == kSep3A || convolution == kSep5A;
  }
  int64_t of_edge() const { return all ? kConvolutions : 2; }
  int64_t convolution(int edge, int convolution) const {
    return (edge * of_edge() + (all ? convolution : convolution == kSep5A)) * planes;
  }
  int64_t reduced(int slot) const { return (kEdges * of_edge() + slot) * planes; }
  int64_t size() const { return reduced(reduction ? kReducing : 0); }
};

// Does any edge that leaves a state pool it?
inline bool pool_alive(const bool (&live)[kEdges][kOperations], int source, int average) {
  for (int target = std::max(2, source + 1); target < kStates; ++target) {
    if (live[edge_of(source, target)][kMaxPool + average]) return true;
  }
  return false;
}
inline bool pools_alive(const bool (&live)[kEdges][kOperations], int source) {
  return pool_alive(live, source, 0) || pool_alive(live, source, 1);
}
// Does any edge that leaves a state compute anything?
inline bool any_alive(const bool (&live)[kEdges][kOperations], int source) {
  for (int target = std::max(2, source + 1); target < kStates; ++target) {
    const bool* edge = live[edge_of(source, target)];
    if (std::find(edge, edge + kOperations, true) != edge + kOperations) return true;
  }
  return false;
}
inline bool any_first(const bool* live) {
  return live[kSep3] || live[kSep5] || live[kDil3] || live[kDil5];
}

}  // namespace nas::NAS_ISA
