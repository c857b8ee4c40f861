// How images and channels lie in Vecs, and how work and memory are divided.
//
// A *plane* is [row][column] of Vec. With sixteen channels and more, a Vec holds sixteen channels of
// one image, and an image has `groups` planes. With fewer, it holds all channels of several images:
// the same code then fills its lanes, and only pointwise convolutions see the difference. A *block*
// is what its lanes hold together: 1 image, or 16 / group images. Lanes that hold nothing (missing
// channels, or images of a last block that is not full) never mix with the others: they are zeros on
// the way in and are left out of every sum at the end.

#pragma once

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "pointwise.h"
#include "storage.h"

namespace nas::NAS_ISA {

constexpr double kEpsilon = 1e-5;   // of the batch normalisations, torch's default
constexpr int64_t kMostChunks = 16;  // and so the most threads that help

struct Layout {
  int64_t images, channels;
  int64_t group;      // lanes of one image: 16, or the power of two that holds its channels
  int64_t groups;     // planes of one image
  int64_t together;   // images of a block
  int64_t blocks;

  Layout(int64_t images, int64_t channels) : images(images), channels(channels) {
    group = 1;
    while (group < channels && group < kLanes) group *= 2;
    groups = (channels + kLanes - 1) / kLanes;
    together = kLanes / group;
    blocks = (images + together - 1) / together;
  }
  int64_t images_of(int64_t block) const { return std::min(together, images - block * together); }
  // Does every lane of every plane of a block hold something?
  bool full(int64_t block) const {
    return images_of(block) == together && channels % group == 0;
  }
  // Lanes of plane `g` of a block that hold something are those below this, in each group.
  int64_t channels_of(int64_t g) const { return std::min(channels - g * kLanes, group); }
};

// Sixteen channels of one image in a Vec, however few there are.
inline Layout whole_images(int64_t images, int64_t channels) {
  Layout layout(images, std::max(channels, int64_t(kLanes)));
  layout.channels = channels;
  return layout;
}

// A fixed share of the blocks. Sums over a batch are taken chunk by chunk and then over chunks in
// their order, so that the result does not depend on the number of threads.
struct Chunks {
  int64_t blocks, count;

  explicit Chunks(int64_t blocks) : blocks(blocks), count(std::min(blocks, kMostChunks)) {}
  int64_t begin(int64_t chunk) const { return chunk * blocks / count; }
  int64_t end(int64_t chunk) const { return (chunk + 1) * blocks / count; }
};

// Hands out pieces of the workspace; with a null base it only adds up their sizes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename U>
  U* take(int64_t count) {
    U* piece = reinterpret_cast<U*>(base_ + used_);
    used_ += (count * int64_t(sizeof(U)) + 63) / 64 * 64;
    return base_ ? piece : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <typename F>
void parallel(const ThreadPool& pool, int64_t units, F&& body) {
  pool.run(
      units,
      [](void* context, int64_t unit, int64_t thread) {
        (*static_cast<std::remove_reference_t<F>*>(context))(unit, thread);
      },
      &body);
}

// Calls f with a constant where an image's lanes are full, so that copies are single moves.
template <typename F>
NAS_INLINE void with_count(int64_t count, F&& f) {
  switch (count) {
    case 2: return f(std::integral_constant<int64_t, 2>{});
    case 4: return f(std::integral_constant<int64_t, 4>{});
    case 8: return f(std::integral_constant<int64_t, 8>{});
    default: return f(count);
  }
}

// Images in memory: pixel x of image n is at[n * image + x * pixel], channels side by side.
template <typename U>
struct Images {
  U* at;
  int64_t image, pixel;

  Images skip(int64_t pixels) const { return {at + pixels * pixel, image, pixel}; }
};

// planes[g * plane + x] = pixels x of a block's images
template <typename S>
void gather(const Layout& layout, int64_t block, Images<const S> from, int64_t pixels,
            Sixteen<S>* planes, int64_t plane) {
  const int64_t first = block * layout.together;
  if (layout.group == kLanes) {
    for (int64_t g = 0; g < layout.groups; ++g) {
      const S* at = from.at + first * from.image + g * kLanes;
      const int64_t count = layout.channels_of(g);
      for (int64_t x = 0; x < pixels; ++x) {
        planes[g * plane + x] = load_stored(at + x * from.pixel, count);
      }
    }
    return;
  }
  const int64_t images = layout.images_of(block);
  if (!layout.full(block)) std::fill(planes, planes + pixels, Sixteen<S>{});
  for (int64_t n = 0; n < images; ++n) {
    const S* at = from.at + (first + n) * from.image;
    S* to = reinterpret_cast<S*>(planes) + n * layout.group;
    with_count(layout.channels, [&](auto count) {
      for (int64_t x = 0; x < pixels; ++x) {
        std::memcpy(to + x * kLanes, at + x * from.pixel, count * sizeof(S));
      }
    });
  }
}

// The way back, from planes of Sixteen<S> or of Vecs that are to be rounded.
template <typename M, typename S>
void scatter(const Layout& layout, int64_t block, const M* planes, int64_t plane, int64_t pixels,
             Images<S> to) {
  const int64_t first = block * layout.together;
  if (layout.group == kLanes) {
    for (int64_t g = 0; g < layout.groups; ++g) {
      S* at = to.at + first * to.image + g * kLanes;
      const int64_t count = layout.channels_of(g);
      for (int64_t x = 0; x < pixels; ++x) {
        store_channels(planes[g * plane + x], at + x * to.pixel, count);
      }
    }
  } else if constexpr (std::is_same_v<M, Sixteen<S>>) {
    for (int64_t n = 0; n < layout.images_of(block); ++n) {
      S* at = to.at + (first + n) * to.image;
      const S* from = reinterpret_cast<const S*>(planes) + n * layout.group;
      with_count(layout.channels, [&](auto count) {
        for (int64_t x = 0; x < pixels; ++x) {
          std::memcpy(at + x * to.pixel, from + x * kLanes, count * sizeof(S));
        }
      });
    }
  } else {
    constexpr int64_t kPiece = 64;
    Sixteen<S> piece[kPiece];
    for (int64_t x = 0; x < pixels; x += kPiece) {
      const int64_t count = std::min(kPiece, pixels - x);
      scatter(layout, block, rounded<S>(planes + x, count, piece), 0, count, to.skip(x));
    }
  }
}

// Per-channel numbers in the lanes of plane `g`, repeated for each image of a block.
template <typename T, typename U>
Vec<T> in_lanes(const Layout& layout, const U* channels, int64_t g) {
  alignas(64) T lanes[kLanes] = {};
  for (int64_t n = 0; n < layout.together; ++n) {
    for (int64_t c = 0; c < layout.channels_of(g); ++c) {
      lanes[n * layout.group + c] = T(channels[g * kLanes + c]);
    }
  }
  return Vec<T>::load(lanes);
}

// One in the lanes of plane `g` that hold channel `first` or a later one.
template <typename T>
Vec<T> channels_from(const Layout& layout, int64_t first, int64_t g) {
  alignas(64) T lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = T(g * kLanes + i % layout.group >= first);
  return Vec<T>::load(lanes);
}

// `x` with zeros in the lanes of images that a last, short block does not have.
template <typename T>
Vec<T> without_missing(const Layout& layout, int64_t block, Vec<T> x) {
  const int64_t images = layout.images_of(block);
  if (images == layout.together) return x;
  alignas(64) T lanes[kLanes];
  x.store(lanes);
  for (int64_t i = images * layout.group; i < kLanes; ++i) lanes[i] = 0;
  return Vec<T>::load(lanes);
}

// Adds up lanes of plane `g` to channels: totals[g * 16 + c] += over a block's images.
template <typename T, typename U>
void add_lanes(const Layout& layout, int64_t images, int64_t g, const Vec<T>& x, U* totals) {
  alignas(64) T lanes[kLanes];
  x.store(lanes);
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t c = 0; c < layout.channels_of(g); ++c) {
      totals[g * kLanes + c] += lanes[n * layout.group + c];
    }
  }
}

// Adds a row of image `n` of a block, from planes [group] of Vec, `plane` apart, to [x][all].
template <typename T>
void add_channels(const Layout& layout, const Vec<T>* planes, int64_t plane, int64_t n,
                  int64_t width, T* to, int64_t all) {
  for (int64_t g = 0; g < layout.groups; ++g) {
    const T* from = reinterpret_cast<const T*>(planes + g * plane) + n * layout.group;
    T* out = to + g * kLanes;
    with_count(layout.channels_of(g), [&](auto count) {
      for (int64_t x = 0; x < width; ++x) {
        for (int64_t c = 0; c < count; ++c) out[x * all + c] += from[x * kLanes + c];
      }
    });
  }
}

// Sums of one plane about its first pixel: no cancellation where the mean is far from zero.
template <typename T>
struct Moments {
  Vec<T> shift, sum, square;

  template <typename M>
  NAS_INLINE void add_row(const M* row, int64_t width, bool first) {
    add(width, first, [row](int64_t x) NAS_INLINED { return widen(row[x]); });
  }
  // value(x) gives the Vec of pixel x.
  template <typename Value>
  NAS_INLINE void add(int64_t width, bool first, Value&& value) {
    if (first) {
      shift = finite_or_zero(value(0));  // infinity less infinity would hide which it was
      sum = square = Vec<T>::zero();
    }
    // two accumulators each, so that no addition waits for the one before
    Vec<T> s = sum, q = square, s2 = Vec<T>::zero(), q2 = Vec<T>::zero();
    int64_t x = 0;
    for (; x + 2 <= width; x += 2) {
      const Vec<T> a = value(x) - shift, b = value(x + 1) - shift;
      s += a;
      q += a * a;
      s2 += b;
      q2 += b * b;
    }
    if (x < width) {
      const Vec<T> a = value(x) - shift;
      s += a;
      q += a * a;
    }
    sum = s + s2;
    square = q + q2;
  }
};

// Mean and (biased) variance of each channel from the moments [block][group] of all planes of
// `pixels`, merged in double as Chan et al. (1979) do, in the order of the blocks.
template <typename T>
void merge_moments(const Layout& layout, const Moments<T>* moments, int64_t pixels, double* mean,
                   double* variance) {
  const double inverse = 1.0 / double(pixels), total = double(layout.images * pixels);
  const auto planes = [&](auto&& each) {
    for (int64_t block = 0; block < layout.blocks; ++block) {
      for (int64_t g = 0; g < layout.groups; ++g) {
        const Moments<T>& m = moments[block * layout.groups + g];
        alignas(64) T lanes[3][kLanes];
        m.shift.store(lanes[0]);
        m.sum.store(lanes[1]);
        m.square.store(lanes[2]);
        for (int64_t n = 0; n < layout.images_of(block); ++n) {
          for (int64_t c = 0; c < layout.channels_of(g); ++c) {
            const int64_t lane = n * layout.group + c;
            each(g * kLanes + c, double(lanes[0][lane]) + double(lanes[1][lane]) * inverse,
                 double(lanes[1][lane]), double(lanes[2][lane]));
          }
        }
      }
    }
  };
  std::fill(mean, mean + layout.channels, 0.0);
  std::fill(variance, variance + layout.channels, 0.0);
  planes([&](int64_t c, double plane_mean, double, double) { mean[c] += plane_mean; });
  for (int64_t c = 0; c < layout.channels; ++c) mean[c] /= double(layout.images);
  planes([&](int64_t c, double plane_mean, double sum, double square) {
    const double apart = plane_mean - mean[c];
    variance[c] += square - sum * sum * inverse + double(pixels) * apart * apart;
  });
  // rounding can leave a tiny negative number where all values are equal; NaN must stay
  for (int64_t c = 0; c < layout.channels; ++c) {
    variance[c] = variance[c] < 0 ? 0 : variance[c] / total;
  }
}

// Sums over a batch of what [block][group] of Vec hold.
template <typename T>
void merge_sums(const Layout& layout, const Vec<T>* sums, double* totals) {
  std::fill(totals, totals + layout.channels, 0.0);
  for (int64_t block = 0; block < layout.blocks; ++block) {
    for (int64_t g = 0; g < layout.groups; ++g) {
      add_lanes(layout, layout.images_of(block), g, sums[block * layout.groups + g], totals);
    }
  }
}

}  // namespace nas::NAS_ISA
