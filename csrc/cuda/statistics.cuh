// Means and variances of the batch, without the cancellation of E[x^2] - E[x]^2.
//
// A block adds up differences to the first number that it meets in a channel, and leaves count,
// mean and sum of squared deviations. A second kernel puts those of all blocks together in double
// precision and in their order.

#pragma once

#include <cmath>

#include "tile.cuh"

namespace nas::cuda {

// What the blocks of one job leave: [chunk][count, mean, squares][channel].
NAS_BOTH int64_t moments_numbers(int chunks, int channels) { return int64_t(chunks) * 3 * channels; }

// Sums of a block, in shared memory.
template <typename A>
struct Moments {
  A *shift, *sum, *square;  // [channel], [worker][channel] twice

  NAS_BOTH static Moments take(Arena& arena, int channels, int vector) {
    const int numbers = Share::of(channels, vector).numbers(vector);
    return {arena.take<A>(channels), arena.take<A>(numbers), arena.take<A>(numbers)};
  }
  // The threads must meet before the next use.
  template <int V>
  NAS_DEVICE void start(int channels) const {
    const Share share = Share::of(channels, V);
    for (int i = int(threadIdx.x); i < share.numbers(V); i += kThreads) sum[i] = square[i] = A(0);
  }
  template <int V>
  NAS_DEVICE void add(int worker, int channels, int channel, const A (&x)[V]) const {
    const int at = worker * channels + channel;
    NAS_UNROLL for (int v = 0; v < V; ++v) {
      const A distance = x[v] - shift[channel + v];
      sum[at + v] += distance;
      square[at + v] += distance * distance;
    }
  }
  // After a barrier: what this block found over `count` numbers a channel.
  template <int V, typename P>
  NAS_DEVICE void finish(int channels, A count, P* to) const {
    const int workers = Share::of(channels, V).workers;
    for (int c = int(threadIdx.x); c < channels; c += kThreads) {
      const A total = column_sum(sum, workers, channels, c);
      to[c] = count;
      to[channels + c] = shift[c] + total / count;
      to[2 * channels + c] = column_sum(square, workers, channels, c) - total * total / count;
    }
  }
};

// One normalisation to settle.
struct Settle {
  int64_t from;   // its moments
  int64_t to;     // its place in the statistics
  int channels, chunks;
};
struct Settles {
  int count = 0;
  Settle job[kEdges * kConvolutions];

  void add(const Settle& settle) { job[count++] = settle; }
};

NAS_DEVICE double warp_sum(double x) {
  NAS_UNROLL for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// Mean and reciprocal deviation from moments, a warp a channel.
template <typename P>
NAS_KERNEL_OF(P)
    settle_moments(const __grid_constant__ Settles settles, const P* moments, P* mean,
                   P* reciprocal_deviation, P* variance) {
  const Settle job = settles.job[blockIdx.y];
  const int lane = int(threadIdx.x) % 32;
  const int channel = int(blockIdx.x) * (kThreads / 32) + int(threadIdx.x) / 32;
  if (channel >= job.channels) return;
  const P* from = moments + job.from + channel;
  double count = 0, total = 0;
  for (int chunk = lane; chunk < job.chunks; chunk += 32) {
    const P* at = from + moments_numbers(chunk, job.channels);
    count += double(at[0]);
    total += double(at[0]) * double(at[job.channels]);
  }
  count = warp_sum(count);
  const double centre = warp_sum(total) / count;
  double squares = 0;
  for (int chunk = lane; chunk < job.chunks; chunk += 32) {
    const P* at = from + moments_numbers(chunk, job.channels);
    const double distance = double(at[job.channels]) - centre;
    squares += double(at[2 * job.channels]) + double(at[0]) * distance * distance;
  }
  squares = warp_sum(squares);
  if (lane) return;
  mean[job.to + channel] = P(centre);
  reciprocal_deviation[job.to + channel] = P(1 / ::sqrt(squares / count + kEpsilon));
  variance[job.to + channel] = P(squares / (count - 1));
}

// What is not computed, or not normalised by the batch, keeps the running statistics.
template <typename P>
NAS_KERNEL_OF(P)
    keep_running(int64_t count, const P* running_mean, const P* running_variance, P* mean,
                 P* reciprocal_deviation, P* variance) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  mean[i] = running_mean[i];
  variance[i] = running_variance[i];
  reciprocal_deviation[i] = P(1 / ::sqrt(double(running_variance[i]) + kEpsilon));
}

}  // namespace nas::cuda
