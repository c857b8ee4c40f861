// A chain of cells, each of which reads the outputs of the two before it: the cells of a network.
//
// Weights, statistics and mixing weights of the cells lie behind each other, cell by cell, and so
// does what a forward pass keeps.

#pragma once

#include <utility>
#include <vector>

#include "cell.h"

namespace nas {

// One cell and where its part of everything begins.
struct Link {
  CellShape shape;
  int64_t weights, statistics;  // offsets into the flat vectors
  int64_t kept;                 // of its room in what is kept
  int64_t convolutions;         // numbers of these that are kept

  int64_t states_numbers() const {
    return 2 * shape.images * shape.height * shape.width * shape.channels;
  }
  int64_t output_numbers() const {
    return shape.images * shape.node_height() * shape.node_width() * kNodes * shape.channels;
  }
  // In its room, in this order, each from a new cache line on: states, output, convolutions. The
  // last cell's output is the result and not kept.
  int64_t output_at() const { return whole_lines(states_numbers()); }
  int64_t convolutions_at(bool last) const {
    return output_at() + (last ? 0 : whole_lines(output_numbers()));
  }
  int64_t room(bool last, bool keep) const {
    return convolutions_at(last) + (keep ? whole_lines(convolutions) : 0);
  }
  // Calls f(first, numbers) with what is kept between the parts and belongs to none.
  template <typename F>
  void for_gaps(bool last, F&& f) const {
    const auto gap = [&](int64_t at, int64_t numbers) {
      const int64_t end = at + numbers, next = at + whole_lines(numbers);
      if (next > end) f(kept + end, next - end);
    };
    gap(0, states_numbers());
    if (!last) gap(output_at(), output_numbers());
    gap(convolutions_at(last), convolutions);
  }

 private:
  static constexpr int64_t whole_lines(int64_t numbers) { return (numbers + 63) / 64 * 64; }
};

// The cells that follow each other after `first`, whose channels and reduction `sizes` begins with.
// kept_numbers(shape) tells how many numbers of convolutions a device keeps.
template <typename KeptNumbers>
std::vector<Link> make_chain(const CellShape& first,
                             const std::vector<std::pair<int64_t, bool>>& sizes,
                             KeptNumbers&& kept_numbers) {
  std::vector<Link> chain;
  Link link{first, 0, 0, 0, 0};
  for (const auto& [channels, reduction] : sizes) {
    CellShape& shape = link.shape;
    shape.channels = channels;
    shape.reduction = reduction;
    link.convolutions = kept_numbers(shape);
    chain.push_back(link);
    link.weights += shape.weights();
    link.statistics += shape.statistics();
    link.kept += link.room(chain.size() == sizes.size(), true);
    shape = {shape.images,   shape.node_height(), shape.node_width(),
             shape.height,   shape.width,         shape.previous_channels,
             kNodes * channels, 0,                shape.partial,
             false,          reduction};
  }
  return chain;
}

}  // namespace nas
