// Where everything of a cell lies, and how planes are cut into tiles.

#pragma once

#include "../cell.h"
#include "number.h"

namespace nas::cuda {

// Channels of an image's pixels: pixel p of the batch starts at at + p * pitch.
template <typename T>
struct Plane {
  T* at;
  int64_t pitch;

  NAS_BOTH T* pixel(int64_t p) const { return at + p * pitch; }
};

// Where pixel p of the batch is.
struct Place {
  int64_t image;
  int y, x;

  NAS_BOTH static Place of(int64_t p, int height, int width) {
    return {p / (int64_t(width) * height), int(p / width % height), int(p % width)};
  }
};

constexpr int kFirst = 4;  // of an edge's convolutions read its state

// With no more mixed channels than these, planes are large and products cheap: dilated convolutions
// are not kept for the backward pass (csrc/cpu/edge.h, Kept, has the same rule).
#if defined(NAS_EMULATION)
inline int kFewChannels = 16;  // tests change it
#else
constexpr int kFewChannels = 16;
#endif

struct Geometry {
  CellShape shape;

  NAS_BOTH int images() const { return int(shape.images); }
  NAS_BOTH int channels() const { return int(shape.channels / shape.partial); }  // mixed ones
  NAS_BOTH int node_height() const { return int(shape.node_height()); }
  NAS_BOTH int node_width() const { return int(shape.node_width()); }
  NAS_BOTH int state_height(int s) const { return s < 2 ? int(shape.height) : node_height(); }
  NAS_BOTH int state_width(int s) const { return s < 2 ? int(shape.width) : node_width(); }
  NAS_BOTH int stride(int s) const { return s < 2 && shape.reduction ? 2 : 1; }
  NAS_BOTH int64_t node_pixels() const {  // of the whole batch
    return shape.images * shape.node_height() * shape.node_width();
  }
  NAS_BOTH int64_t input_pixels() const { return shape.images * shape.height * shape.width; }
  NAS_BOTH int64_t state_pixels(int s) const { return s < 2 ? input_pixels() : node_pixels(); }
  NAS_BOTH int64_t plane() const { return node_pixels() * channels(); }  // numbers of one

  template <typename T>
  NAS_BOTH Plane<T> state(T* states, T* output, int s) const {
    if (s < 2) return {states + s * input_pixels() * shape.channels, shape.channels};
    return {output + (s - 2) * shape.channels, kNodes * shape.channels};
  }
  // Planes that a forward pass keeps: convolutions before their normalisation, of each edge the
  // first ones of the separable operations and, with more than a few channels, the dilated ones.
  NAS_BOTH bool keeps(int convolution) const;
  NAS_BOTH int of_edge() const { return channels() > kFewChannels ? kFirst : 2; }
  NAS_BOTH int64_t kept_convolution(int edge, int which) const {
    return (edge * of_edge() + (which < kDilated3 ? which / 2 : which - 2)) * plane();
  }
  NAS_BOTH int64_t reduced(int slot) const { return (kEdges * of_edge() + slot) * plane(); }
  NAS_BOTH int64_t kept() const { return reduced(shape.reduction ? kReducing : 0); }
  // Planes of the others, which either pass computes for itself: second ones of the edges into one
  // node, then dilated ones of `edges` edges from `first` on.
  NAS_BOTH int64_t unkept_convolution(int edge, int which, int first) const;
  NAS_BOTH int64_t unkept(int edges) const {
    return 2 * (kSources + (keeps(kDilated3) ? 0 : edges)) * plane();
  }
};

// The depthwise part of a convolution.
struct Taps {
  int size, dilation, stage;

  NAS_BOTH static Taps of(int convolution) {
    switch (convolution) {
      case kSep3A: return {3, 1, 0};
      case kSep3B: return {3, 1, 1};
      case kDilated3: return {3, 2, 2};
      case kSep5A: return {5, 1, 0};
      case kSep5B: return {5, 1, 1};
      default: return {5, 2, 2};
    }
  }
  NAS_BOTH int count() const { return size * size; }
  NAS_BOTH int padding() const { return size / 2 * dilation; }
  // Offset into the flat weights.
  NAS_BOTH int64_t at(const Geometry& g, int edge) const {
    return (size == 3 ? g.shape.depthwise3() : g.shape.depthwise5()) +
           int64_t(edge * 3 + stage) * count() * g.channels();
  }
};
NAS_BOTH int64_t matrix_at(const Geometry& g, int edge, int convolution) {
  return g.shape.pointwise() +
         int64_t(edge * kConvolutions + convolution) * g.channels() * g.channels();
}
NAS_BOTH int64_t reduce_at(const Geometry& g, int slot) {
  return g.shape.reduce() + int64_t(slot) * g.channels() * g.channels();
}
NAS_BOTH int target_of(int edge) { return edge < 2 ? 2 : edge < 5 ? 3 : edge < 9 ? 4 : 5; }
NAS_BOTH int source_of(int edge) { return edge - first_edge(target_of(edge)); }
// The convolution that an operation ends with; kSep3 and kSep5 begin with the one before it.
NAS_BOTH int last_convolution(int operation) {
  return operation == kSep3   ? kSep3B
         : operation == kSep5 ? kSep5B
         : operation == kDil3 ? kDilated3
                              : kDilated5;
}
NAS_BOTH int operation_of(int convolution) {
  return convolution <= kSep3B ? kSep3 : convolution <= kSep5B ? kSep5 : kDil3 + convolution - 4;
}
NAS_BOTH bool is_second(int convolution) {
  return convolution == kSep3B || convolution == kSep5B;
}
// In the place of a convolution: the maximum or, one further, the average of the state that the
// edge leaves.
constexpr int kPooled = kConvolutions;
NAS_BOTH bool is_pool(int convolution) { return convolution >= kPooled; }
constexpr int kFromState = kNodes * kFirst + 2;  // convolutions and pools of an input of the cell

NAS_BOTH bool Geometry::keeps(int convolution) const {
  return !is_second(convolution) && (convolution < kDilated3 || of_edge() == kFirst);
}
NAS_BOTH int64_t Geometry::unkept_convolution(int edge, int which, int first) const {
  if (is_second(which)) return (2 * source_of(edge) + which / 2) * plane();
  return (2 * (kSources + edge - first) + which - kDilated3) * plane();
}

// Convolutions and pools of one launch, those of one input together.
struct Jobs {
  static constexpr int kMost = kEdges * kConvolutions;
  int count = 0, inputs = 0;
  uint8_t edge[kMost], convolution[kMost];
  uint8_t end[kMost];  // of an input's jobs

  void add(int e, int c) {
    edge[count] = uint8_t(e);
    convolution[count++] = uint8_t(c);
  }
  // What was added since the last call reads one input.
  void close() {
    if (count > begin(inputs)) end[inputs++] = uint8_t(count);
  }
  int begin(int input) const { return input ? end[input - 1] : 0; }
};

// Blocks that share the work of a job: enough to fill a large GPU, whatever the number of jobs. It
// decides the order of sums, so it depends on the shapes alone.
#if defined(NAS_EMULATION)
inline int kBlocks = 528;  // tests lower it: small cells are then shared as large ones are
#else
constexpr int kBlocks = 528;
#endif
inline int chunks_for(int64_t units, int jobs) {
  return int(smaller<int64_t>(units, larger<int64_t>(1, divide_up(kBlocks, larger(jobs, 1)))));
}
constexpr int kStream = 1024;  // blocks of a launch that only passes over memory
inline unsigned blocks_for(int64_t items) {
  return unsigned(smaller<int64_t>(divide_up(items, kThreads), kStream));
}
// The units of `chunk`: first to last - 1.
struct Span {
  int64_t first, last;

  NAS_BOTH static Span of(int64_t units, int chunks, int chunk) {
    return {units * chunk / chunks, units * (chunk + 1) / chunks};
  }
  NAS_BOTH int64_t count() const { return last - first; }
};

// Jobs of one input that a block takes one after another, so that it reads the input once: the
// block finds them by blockIdx.y.
struct Groups {
  int count = 0, most = 0;  // most: jobs of the largest
  uint8_t first[Jobs::kMost], last[Jobs::kMost];

  // The part of a GPU that the tiles must fill for all jobs of an input to be one group. Another
  // group reads the input again, mostly from the second cache; a GPU of which an eighth is busy
  // loses more than that. 64 tiles are enough, so a batch of 64 images is read once.
  static constexpr int kFilled = 8;

  // All jobs of an input together, unless there are more than `limit` or so few tiles.
  static Groups of(const Jobs& jobs, int64_t tiles, int limit) {
    const auto wanted = larger<int64_t>(1, kBlocks / kFilled / (tiles * larger(jobs.inputs, 1)));
    Groups groups;
    for (int input = 0; input < jobs.inputs; ++input) {
      const int begin = jobs.begin(input), size = jobs.end[input] - begin;
      const int parts = int(smaller<int64_t>(size, larger(wanted, divide_up(size, limit))));
      for (int part = 0; part < parts; ++part) {
        const Span span = Span::of(size, parts, part);
        groups.first[groups.count] = uint8_t(begin + span.first);
        groups.last[groups.count++] = uint8_t(begin + span.last);
        groups.most = larger(groups.most, int(span.count()));
      }
    }
    return groups;
  }
};

// A plane cut into tiles of `rows` x `columns` pixels of `images` images.
struct Tiling {
  int total_images, height, width;
  int images, rows, columns;
  int slab;  // channels whose inputs are in shared memory at once

  NAS_BOTH int down() const { return (height + rows - 1) / rows; }
  NAS_BOTH int across() const { return (width + columns - 1) / columns; }
  NAS_BOTH int64_t tiles() const {
    return int64_t(divide_up(total_images, images)) * down() * across();
  }
  NAS_BOTH int pixels() const { return images * rows * columns; }
};
struct Tile {
  int image, y, x;                // its first pixel
  int images, rows, columns;      // as much of it as is inside the plane

  NAS_BOTH static Tile of(const Tiling& t, int64_t index) {
    const int across = t.across(), down = t.down();
    Tile tile;
    tile.x = int(index % across) * t.columns;
    tile.y = int(index / across % down) * t.rows;
    tile.image = int(index / across / down) * t.images;
    tile.images = smaller(t.images, t.total_images - tile.image);
    tile.rows = smaller(t.rows, t.height - tile.y);
    tile.columns = smaller(t.columns, t.width - tile.x);
    return tile;
  }
  NAS_BOTH int64_t start(const Tiling& t) const {  // its first pixel in the batch
    return (int64_t(image) * t.height + y) * t.width + x;
  }
  NAS_BOTH int pixels() const { return images * rows * columns; }  // inside the plane
};
// One pixel of a tile by its number, image by image and row by row.
struct Pixel {
  int64_t at;    // in the batch
  bool inside;   // the plane

  NAS_BOTH static Pixel of(const Tiling& t, const Tile& tile, int number) {
    const int x = number % t.columns, y = number / t.columns % t.rows;
    const int image = number / (t.columns * t.rows);
    return {(int64_t(tile.image + image) * t.height + tile.y + y) * t.width + tile.x + x,
            image < tile.images && y < tile.rows && x < tile.columns};
  }
};

}  // namespace nas::cuda
