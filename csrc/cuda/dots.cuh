// Sums over the batch that the backward pass needs, and what is made of them.

#pragma once

#include "combine.cuh"
#include "gradient.cuh"

namespace nas::cuda {

// ---- products of a node's gradient with all that an edge adds to the node ----

// Of each edge into a node, by operation: <g, y - m>; in the place of `none`: <g, 1>.
template <typename T>
struct Dots {
  Geometry g;
  int target;
  const Sum<T>* node;                              // the node's gradient
  const T* plane[kSources][kOperations];           // null where an operation is not alive
  int pitch[kSources][kOperations];
  int64_t statistic[kSources][kOperations];        // or -1: not normalised
  const Sum<T>* mean;
  Sum<T>* to;                                      // [source][chunk][operation][channels]
};

// Its shared memory: scratch to add up in, and the means [operation][channel], for which threads have
// no registers.
template <typename A, int V>
NAS_BOTH int64_t take_dots(Arena arena, int channels, A** sums, A** means) {
  *sums = arena.take<A>(kThreads * V);
  *means = arena.take<A>(int64_t(kOperations) * channels);
  return arena.used();
}

template <typename T, int V>
NAS_KERNEL_OF(T) dots(const __grid_constant__ Dots<T> call) {
  using A = Sum<T>;
  const Geometry& g = call.g;
  const int s = int(blockIdx.y), channels = g.channels();
  const Share share = Share::of(channels, V);
  A *sums, *means;
  take_dots<A, V>(Arena(shared_memory()), channels, &sums, &means);
  const Span span = Span::of(g.node_pixels(), int(gridDim.x), int(blockIdx.x));
  A* to = call.to + (s * int64_t(gridDim.x) + blockIdx.x) * kOperations * channels;

  const T* planes[kOperations];
  NAS_UNROLL for (int k = 0; k < kOperations; ++k) planes[k] = call.plane[s][k];
  for (int i = int(threadIdx.x); i < kOperations * channels; i += kThreads) {
    const int k = i / channels;
    const bool normalised = call.plane[s][k] && call.statistic[s][k] >= 0;
    means[i] = normalised ? call.mean[call.statistic[s][k] + i % channels] : A(0);
  }
  __syncthreads();
  for (int start = 0; start < share.items(); start += kThreads) {
    const int item = start + int(threadIdx.x);
    const int worker = item / share.across, channel = item % share.across * V;
    A total[kOperations][V] = {};
    if (item < share.items()) {
      for (int64_t p = span.first + worker; p < span.last; p += share.workers) {
        A gradient[V];
        load<V>(call.node + p * channels + channel, gradient);
        NAS_UNROLL for (int v = 0; v < V; ++v) total[0][v] += gradient[v];
        NAS_UNROLL for (int k = 1; k < kOperations; ++k) {
          if (!planes[k]) continue;
          A values[V], mean[V];
          load<V>(planes[k] + p * call.pitch[s][k] + channel, values);
          load<V>(means + k * channels + channel, mean);
          NAS_UNROLL for (int v = 0; v < V; ++v) {
            total[k][v] += gradient[v] * (values[v] - mean[v]);
          }
        }
      }
    }
    const int columns = smaller(share.across, kThreads) * V;
    const int first = start / share.workers * V;  // channel of the first of these threads
    NAS_UNROLL for (int k = 0; k < kOperations; ++k) {
      __syncthreads();
      if (item < share.items()) {
        NAS_UNROLL for (int v = 0; v < V; ++v) {
          sums[worker * columns + channel - first + v] = total[k][v];
        }
      }
      __syncthreads();
      for (int c = int(threadIdx.x); c < columns && first + c < channels; c += kThreads) {
        to[k * channels + first + c] = column_sum(sums, share.workers, columns, c);
      }
    }
  }
}

// What becomes of them, and of those of the first convolutions. A block takes one (edge, operation).
template <typename P>
struct SettleDots {
  Geometry g;
  int target, chunks;
  bool training;
  bool live[kSources][kOperations];
  const P* sums;             // see Dots
  const P *operations, *mean, *scale;
  P* coefficients;           // [edge][convolution][3][channels]
  P* reduced;                // [slot][3][channels]
  double* pooled;            // [edge][maximum, average][sum, product][channels], for later
  P* operations_gradient;    // or null
};

// a, d and b at the top of gradient.cuh.
template <typename P>
NAS_DEVICE void store_coefficients(double weight, double sum, double product, double numbers,
                                   bool training, double mean, double scale, int channels, int c,
                                   P* to) {
  const double each = training ? 1 / numbers : 0.0;
  const double a = weight * scale, d = -a * scale * scale * product * each;
  to[c] = P(a);
  to[channels + c] = P(d);
  to[2 * channels + c] = P(-a * sum * each - d * mean);
}

// Sum over `chunks` of from[chunk * step] in a fixed order, by a warp whose lanes all get it.
template <typename P>
NAS_DEVICE double chunk_sum(const P* from, int64_t step, int chunks) {
  double total = 0;
  for (int chunk = int(threadIdx.x) % 32; chunk < chunks; chunk += 32) {
    total += double(from[chunk * step]);
  }
  return warp_sum(total);
}

template <typename P>
NAS_KERNEL_OF(P)
    settle_dots(const __grid_constant__ SettleDots<P> call) {
  const Geometry& g = call.g;
  const int s = int(blockIdx.y), operation = int(blockIdx.x), channels = g.channels();
  const int edge = edge_of(s, call.target), place = edge * kOperations + operation;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (!call.live[s][operation]) {
    if (threadIdx.x == 0 && call.operations_gradient) call.operations_gradient[place] = P(0);
    return;
  }
  int64_t at = -1;
  P* coefficients = nullptr;
  if (operation == kMaxPool || operation == kAveragePool) {
    at = g.shape.pool_statistics(s, operation - kMaxPool);
  } else if (operation >= kSep3) {
    const int convolution = last_convolution(operation);
    at = g.shape.convolution_statistics(edge, convolution);
    coefficients = call.coefficients + (edge * kConvolutions + convolution) * 3 * channels;
  } else if (g.stride(s) == 2) {
    at = g.shape.reduce_statistics(reducing_slot(s, call.target));
    coefficients = call.reduced + reducing_slot(s, call.target) * 3 * channels;
  }
  const int64_t step = int64_t(kOperations) * channels;
  const P* from = call.sums + s * int64_t(call.chunks) * step;
  const double weight = double(call.operations[place]), numbers = double(g.node_pixels());
  double total = 0;
  for (int c = warp; c < channels; c += kWarps) {
    const double sum = chunk_sum(from + c, step, call.chunks);
    const double product = chunk_sum(from + operation * channels + c, step, call.chunks);
    const double scale = at < 0 ? 1.0 : double(call.scale[at + c]);
    total += product * scale;
    if (lane) continue;
    if (coefficients) {
      store_coefficients(weight, sum, product, numbers, call.training, double(call.mean[at + c]),
                         scale, channels, c, coefficients);
    } else if (at >= 0) {
      double* kept = call.pooled + (edge * 2 + operation - kMaxPool) * 2 * channels;
      kept[c] = weight * sum;
      kept[channels + c] = weight * product;
    }
  }
  double* totals = reinterpret_cast<double*>(shared_memory());
  if (lane == 0) totals[warp] = total;
  __syncthreads();
  if (threadIdx.x || !call.operations_gradient) return;
  double all = 0;
  for (int i = 0; i < kWarps; ++i) all += totals[i];
  call.operations_gradient[place] = P(all);
}

// Two sums a channel over a block's part of `pixels` pixels: of a gradient and of its product with
// something else, both of which read(number, channel, ...) gives for V channels: to [2][channels].
template <int V, typename A, typename Read>
NAS_DEVICE void sum_pairs(int64_t pixels, int channels, A* to, const Read& read) {
  const Share share = Share::of(channels, V);
  const Span span = Span::of(pixels, int(gridDim.x), int(blockIdx.x));
  A* sums = reinterpret_cast<A*>(shared_memory());
  A* products = sums + share.numbers(V);
  for (int item = int(threadIdx.x); item < share.items(); item += kThreads) {
    const int worker = item / share.across, channel = item % share.across * V;
    A sum[V] = {}, product[V] = {};
    for (int64_t p = span.first + worker; p < span.last; p += share.workers) {
      A gradient[V], values[V];
      read(p * channels + channel, channel, gradient, values);
      NAS_UNROLL for (int v = 0; v < V; ++v) {
        sum[v] += gradient[v];
        product[v] += gradient[v] * values[v];
      }
    }
    NAS_UNROLL for (int v = 0; v < V; ++v) {
      sums[item * V + v] = sum[v];
      products[item * V + v] = product[v];
    }
  }
  __syncthreads();
  for (int c = int(threadIdx.x); c < channels; c += kThreads) {
    to[c] = column_sum(sums, share.workers, channels, c);
    to[channels + c] = column_sum(products, share.workers, channels, c);
  }
}
template <typename A>
int64_t pairs_bytes(int channels, int vector) {
  return 2 * int64_t(Share::of(channels, vector).numbers(vector)) * int64_t(sizeof(A));
}

// Coefficients from pairs of sums [chunk][2][channels], a warp a channel.
template <typename P>
struct SettlePairs {
  struct Job {
    const P* sums;
    int64_t statistic;
    P* coefficients;
  };
  Job job[2 * kSources];
  int count = 0, chunks, channels;
  double numbers;   // of a channel
  bool training;
  bool normalised;  // what the coefficients go with; the products are with normalised numbers
  const P *mean, *scale;
};

template <typename P>
NAS_KERNEL_OF(P)
    settle_pairs(const __grid_constant__ SettlePairs<P> call) {
  const auto& job = call.job[blockIdx.y];
  const int c = int(blockIdx.x) * (kThreads / 32) + int(threadIdx.x) / 32;
  if (c >= call.channels) return;
  const int64_t step = 2 * int64_t(call.channels);
  const double sum = chunk_sum(job.sums + c, step, call.chunks);
  const double product = chunk_sum(job.sums + call.channels + c, step, call.chunks);
  if (threadIdx.x % 32) return;
  const double scale = double(call.scale[job.statistic + c]);
  if (!call.normalised) {
    store_coefficients(1.0, sum, product / scale, call.numbers, call.training,
                       double(call.mean[job.statistic + c]), scale, call.channels, c,
                       job.coefficients);
    return;
  }
  const double each = call.training ? scale / call.numbers : 0.0;
  job.coefficients[c] = P(scale);
  job.coefficients[call.channels + c] = P(-product * each);
  job.coefficients[2 * call.channels + c] = P(-sum * each);
}

// ---- pools ----

// Coefficients of both pools of state s, from all edges that leave it.
template <typename P>
NAS_KERNEL_OF(P)
    settle_pools(Geometry g, int s, uint32_t live, bool training, const double* pooled,
                 const P* mean, const P* scale, P* coefficients) {
  const int average = int(blockIdx.y), channels = g.channels();
  const int c = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (c >= channels) return;
  double sum = 0, product = 0;
  for (int target = kStates - 1; target >= larger(2, s + 1); --target) {
    if (!(live >> (2 * target + average) & 1)) continue;
    const double* from = pooled + (edge_of(s, target) * 2 + average) * 2 * channels;
    sum += from[c];
    product += from[channels + c];
  }
  const int64_t at = g.shape.pool_statistics(s, average) + c;
  store_coefficients(1.0, sum, product, double(g.node_pixels()), training, double(mean[at]),
                     double(scale[at]), channels, c, coefficients + average * 3 * channels);
}

// The gradient of both pools of state s before their normalisation.
template <typename T>
struct PoolGradient {
  Geometry g;
  int s;
  uint32_t live;                       // bit 2 target + average
  const T* pools;                      // maximum, average
  const Sum<T>* nodes;                 // gradients of the nodes
  const Sum<T>*operations, *coefficients;
  Sum<T>* to;                          // maximum, average
};

template <typename T, int V>
NAS_KERNEL_OF(T)
    pool_gradient(const __grid_constant__ PoolGradient<T> call) {
  using A = Sum<T>;
  const Geometry& g = call.g;
  const int average = int(blockIdx.y), channels = g.channels(), across = channels / V;
  const Coefficients<A> coefficients{call.coefficients + average * 3 * channels, channels};
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < g.node_pixels() * across;
       i += int64_t(gridDim.x) * kThreads) {
    const int channel = int(i % across) * V;
    A sum[V] = {};
    bool any = false;
    for (int target = larger(2, call.s + 1); target < kStates; ++target) {
      if (!(call.live >> (2 * target + average) & 1)) continue;
      const A weight =
          call.operations[edge_of(call.s, target) * kOperations + kMaxPool + average];
      A values[V];
      load<V>(call.nodes + (target - 2) * g.plane() + i * V, values);
      NAS_UNROLL for (int v = 0; v < V; ++v) sum[v] += weight * values[v];
      any = true;
    }
    A pooled[V];
    load<V>(call.pools + average * g.plane() + i * V, pooled);
    NAS_UNROLL for (int v = 0; v < V; ++v) {
      sum[v] = any ? coefficients(sum[v], pooled[v], channel + v) : A(0);
    }
    store<V>(call.to + average * g.plane() + i * V, sum);
  }
}

// ---- channels that pass the edges by ----

// Products of what an edge lets pass with the gradient of where it goes: [edge][chunk].
template <typename T>
struct BypassDots {
  Geometry g;
  const T *states, *output;
  const Sum<T>* rest;   // gradients of the nodes' other channels [node][pixel][C - c]
  Sum<T>* to;
};

template <typename T, int V>
NAS_KERNEL_OF(T)
    bypass_dots(const __grid_constant__ BypassDots<T> call) {
  using A = Sum<T>;
  const Geometry& g = call.g;
  const int edge = int(blockIdx.y), s = source_of(edge), target = target_of(edge);
  const int mixed = g.channels(), passing = int(g.shape.channels) - mixed;
  const int across = passing / V;
  const Plane<const T> state = g.state(call.states, call.output, s);
  const A* rest = call.rest + (target - 2) * g.node_pixels() * passing;
  const Span span = Span::of(g.node_pixels() * across, int(gridDim.x), int(blockIdx.x));
  A total = A(0);
  for (int64_t i = span.first + threadIdx.x; i < span.last; i += kThreads) {
    A gradient[V], values[V];
    int which[V];
    load<V>(rest + i * V, gradient);
    bypassing(g, state, s, Place::of(i / across, g.node_height(), g.node_width()),
              mixed + int(i % across) * V, values, which);
    NAS_UNROLL for (int v = 0; v < V; ++v) total += gradient[v] * values[v];
  }
  A* sums = reinterpret_cast<A*>(shared_memory());
  sums[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x) return;
  call.to[edge * int64_t(gridDim.x) + blockIdx.x] = column_sum(sums, kThreads, 1, 0);
}

template <typename P>
NAS_KERNEL_OF(P) settle_bypass(int chunks, const P* sums, P* to) {
  const int edge = int(blockIdx.y);
  if (threadIdx.x >= 32) return;
  const double total = chunk_sum(sums + int64_t(edge) * chunks, 1, chunks);
  if (threadIdx.x == 0) to[edge] = P(total);
}

// ---- weight gradients ----

// Adds up what the chunks of many jobs left: count numbers each.
template <typename P>
struct AddChunks {
  static constexpr int kJobs = 80;
  struct Job {
    const P* from;
    P* to;
    int chunks, count;
  };
  Job job[kJobs];
  int jobs = 0, most = 0;

  void add(const P* from, P* to, int chunks, int64_t count) {
    job[jobs++] = {from, to, chunks, int(count)};
    most = larger(most, int(count));
  }
};

template <typename P>
NAS_KERNEL_OF(P) add_chunks(const __grid_constant__ AddChunks<P> call) {
  const auto& job = call.job[blockIdx.y];
  const int i = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (i >= job.count) return;
  P total = P(0);
  NAS_UNROLL_BY(8) for (int chunk = 0; chunk < job.chunks; ++chunk) {
    total += job.from[int64_t(chunk) * job.count + i];
  }
  job.to[i] = total;
}

}  // namespace nas::cuda
