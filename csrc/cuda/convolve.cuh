// Convolutions, depthwise and pointwise, and pools, with the sums that their normalisations need. A
// block brings a tile of an input into shared memory once, with the largest border that anything
// needs which it makes from it: all edges that leave a state read the same tile.

#pragma once

#include "pool.cuh"
#include "product.cuh"

namespace nas::cuda {

// The input of a first convolution, rectified, or of a pool.
template <typename T>
struct OfState {
  Plane<const T> state;
  bool rectified;

  template <int V>
  NAS_DEVICE void operator()(int64_t pixel, int channel, Sum<T> (&values)[V]) const {
    load<V>(state.pixel(pixel) + channel, values);
    NAS_UNROLL for (int v = 0; v < V; ++v) values[v] = rectified ? relu(values[v]) : values[v];
  }
};

// That of a second one: what the first gave, normalised and rectified.
template <typename T>
struct NormalisedAndRectified {
  Plane<const T> plane;
  const Sum<T>*mean, *scale;

  template <int V>
  NAS_DEVICE void operator()(int64_t pixel, int channel, Sum<T> (&values)[V]) const {
    load<V>(plane.pixel(pixel) + channel, values);
    NAS_UNROLL for (int v = 0; v < V; ++v) {
      values[v] = relu((values[v] - mean[channel + v]) * scale[channel + v]);
    }
  }
};

// What an edge's convolutions and its source's pools read.
template <typename T>
struct Inputs {
  Geometry g;
  const T *states, *output;   // see cell.h
  const T *kept, *unkept;     // planes of convolutions
  int first;                  // edge whose dilated ones are in `unkept`
  const Sum<T>*mean, *reciprocal_deviation;
  const Sum<T>* weights;

  NAS_BOTH Plane<const T> plane(int edge, int convolution) const {
    return {place(kept, unkept, edge, convolution), g.channels()};
  }
  template <typename At>
  NAS_BOTH At* place(At* kept, At* unkept, int edge, int convolution) const {
    return g.keeps(convolution) ? kept + g.kept_convolution(edge, convolution)
                                : unkept + g.unkept_convolution(edge, convolution, first);
  }
  // Calls f(reader) with what gives the input of a convolution.
  template <typename F>
  NAS_DEVICE void with_input(int edge, int convolution, F&& f) const {
    if (is_second(convolution)) {  // the one before it was kept
      const int64_t at = g.shape.convolution_statistics(edge, convolution - 1);
      f(NormalisedAndRectified<T>{{kept + g.kept_convolution(edge, convolution - 1), g.channels()},
                                  mean + at, reciprocal_deviation + at});
    } else {
      f(OfState<T>{g.state(states, output, source_of(edge)), !is_pool(convolution)});
    }
  }
  NAS_BOTH Steps steps(int edge, int convolution) const {
    const int stride = is_second(convolution) ? 1 : g.stride(source_of(edge));
    if (is_pool(convolution)) return {3, 1, stride};
    const Taps taps = Taps::of(convolution);
    return {taps.size, taps.dilation, stride};
  }
  NAS_BOTH int input_height(int edge, int convolution) const {
    return is_second(convolution) ? g.node_height() : g.state_height(source_of(edge));
  }
  NAS_BOTH int input_width(int edge, int convolution) const {
    return is_second(convolution) ? g.node_width() : g.state_width(source_of(edge));
  }
  // What the jobs first..last - 1, which have one input, read of a tile.
  NAS_BOTH Region region(const Jobs& jobs, int first, int last, const Tiling& t) const {
    Region region = steps(jobs.edge[first], jobs.convolution[first]).region(t);
    for (int job = first + 1; job < last; ++job) {
      region.include(steps(jobs.edge[job], jobs.convolution[job]).region(t));
    }
    return region;
  }
};

// Fills the region of a tile of a job's input: channels first..first + slab - 1.
template <int V, typename T>
NAS_DEVICE void load_input(const Inputs<T>& in, int edge, int convolution, const Region& region,
                           const Tiling& t, const Tile& tile, int first, int slab, Sum<T>* to) {
  const int stride = in.steps(edge, convolution).stride;
  in.with_input(edge, convolution, [&](const auto& read) {
    const Part part{tile.image,
                    tile.images,
                    tile.y * stride - region.border,
                    tile.x * stride - region.border,
                    in.input_height(edge, convolution),
                    in.input_width(edge, convolution)};
    load_region<V>(region, t, part, first, slab, to, read);
  });
}

template <typename A>
struct ConvolveMemory {
  A *region, *depthwise, *staged;
  int* places;
  JobSums<A> sums;

  NAS_BOTH static ConvolveMemory take(Arena& arena, const Tiling& t, int64_t region, int jobs,
                                      int channels) {
    ConvolveMemory memory;
    memory.region = arena.take<A>(region);
    memory.depthwise = arena.take<A>(int64_t(t.pixels()) * row_pitch(channels));
    memory.staged = arena.take<A>(staged_numbers(channels));
    memory.places = arena.take<int>(t.pixels());
    memory.sums = JobSums<A>::take(arena, jobs, channels);
    return memory;
  }
};

// Convolutions and pools of one launch. The pools of an input are the first of its jobs.
template <typename T>
struct Convolve {
  Inputs<T> in;
  Jobs jobs;
  Groups groups;
  Tiling tiling;
  int64_t region;              // numbers of a group's largest
  int summed;                  // jobs of a block whose sums are in shared memory: all or none
  T *kept, *unkept;            // planes of convolutions; null where the jobs have none of these
  T* pools[kSources];          // of a state: maximum, then average
  uint8_t* largest[kSources];  // where in its window a maximum is; null where nobody asks
  Sum<T>* moments;             // of each job, or null where nobody asks
};

// The work of one block.
template <typename T, int V>
class ConvolveBlock {
  using A = Sum<T>;

 public:
  NAS_DEVICE explicit ConvolveBlock(const Convolve<T>& call)
      : call_(call), t_(call.tiling), first_(call.groups.first[blockIdx.y]),
        last_(call.groups.last[blockIdx.y]), channels_(call.in.g.channels()) {
    Arena arena(shared_memory());
    memory_ = ConvolveMemory<A>::take(arena, t_, call.region, call.summed, channels_);
    if (call.moments && !call.summed) {
      memory_.sums.sums = moments(first_);
      memory_.sums.apart = moments(first_ + 1) - moments(first_);
    }
    region_ = call.in.region(call.jobs, first_, last_, t_);
    while (first_ + pools_ < last_ && is_pool(convolution(first_ + pools_))) ++pools_;
  }

  NAS_DEVICE void run() {
    const Span span = Span::of(t_.tiles(), int(gridDim.x), int(blockIdx.x));
    if (call_.moments) memory_.sums.start(last_ - first_);
    clear_padding(memory_.depthwise, t_.pixels(), channels_, row_pitch(channels_));
    A count = A(0);
    for (int64_t index = span.first; index < span.last; ++index) {
      begins_ = index == span.first;
      const Tile tile = Tile::of(t_, index);
      count += A(tile.pixels());
      find_places(t_, tile, memory_.places);
      if (pools_) pool(tile);
      // channels that do not fit come once more for each convolution
      if (whole() && first_ + pools_ < last_) load_whole(tile);
      for (int job = first_ + pools_; job < last_; ++job) convolve(tile, job);
    }
    if (!call_.moments) return;
    __syncthreads();
    for (int job = first_; job < last_; ++job) {
      memory_.sums.finish(job - first_, count, moments(job));
    }
  }

 private:
  NAS_DEVICE int edge(int job) const { return call_.jobs.edge[job]; }
  NAS_DEVICE int convolution(int job) const { return call_.jobs.convolution[job]; }
  NAS_DEVICE bool whole() const { return t_.slab >= channels_; }
  NAS_DEVICE int slab(int first) const { return smaller(t_.slab, channels_ - first); }
  // What the block leaves of a job's moments.
  NAS_DEVICE A* moments(int job) const {
    const int chunk = job * int(gridDim.x) + int(blockIdx.x);
    return call_.moments + moments_numbers(chunk, channels_);
  }

  NAS_DEVICE void load_tile(const Tile& tile, int job, int first) const {
    load_input<V>(call_.in, edge(job), convolution(job), region_, t_, tile, first, slab(first),
                  memory_.region);
    __syncthreads();
  }
  // All channels, rectified. Pools have left them there as they are.
  NAS_DEVICE void load_whole(const Tile& tile) const {
    if (!pools_) return load_tile(tile, first_, 0);
    rectify(memory_.region, region_.numbers(t_.images));
    __syncthreads();
  }

  NAS_DEVICE Output<V, T> output(const Tile& tile, T* plane, int job, int first, int last) const {
    return {{plane + tile.start(t_) * channels_, memory_.places, t_.pixels(), channels_, first,
             last},
            memory_.sums, job - first_, begins_, call_.moments != nullptr};
  }
  // After a barrier, and before the next one.
  NAS_DEVICE void fold(int job) const {
    if (call_.moments) memory_.sums.fold(job - first_);
  }

  NAS_DEVICE void pool(const Tile& tile) const {
    for (int first = 0; first < channels_; first += t_.slab) {
      load_tile(tile, first_, first);
      for (int job = first_; job < first_ + pools_; ++job) {
        pool(tile, job, first);
        __syncthreads();
        fold(job);
        __syncthreads();
      }
    }
  }
  NAS_DEVICE void pool(const Tile& tile, int job, int first) const {
    const Geometry& g = call_.in.g;
    const int s = source_of(edge(job)), average = convolution(job) - kPooled;
    const PoolTile<A> work{t_, tile, region_, memory_.region, g.stride(s), g.state_height(s),
                           g.state_width(s), slab(first)};
    const auto to = output(tile, call_.pools[s] + average * g.plane(), job, first,
                           first + slab(first));
    if (average) {
      work.template run<true>([&](const auto& patch, const auto&) { to(patch); });
      return;
    }
    uint8_t* largest = call_.largest[s];
    if (largest) largest += tile.start(t_) * channels_;
    work.template run<false>([&](const auto& patch, const auto& where) {
      to(patch);
      if (largest) store_where(to.stored, patch, where, largest + first + patch.column);
    });
  }
  template <typename Patch>
  NAS_DEVICE void store_where(const Stored<V, T>& stored, const Patch& patch,
                              const uint8_t (&where)[4][4], uint8_t* to) const {
    stored.for_inside(patch, [&](int i, int place) {
      uint8_t* at = to + int64_t(place) * channels_;
      if (V >= 4) {
        *reinterpret_cast<uint32_t*>(at) = uint32_t(where[i][0]) | uint32_t(where[i][1]) << 8 |
                                           uint32_t(where[i][2]) << 16 |
                                           uint32_t(where[i][3]) << 24;
        return;
      }
      NAS_UNROLL for (int j = 0; j < 4; ++j) {
        if (stored.first + patch.column + j < stored.last) at[j] = where[i][j];
      }
    });
  }

  NAS_DEVICE void convolve(const Tile& tile, int job) const {
    const Geometry& g = call_.in.g;
    const int edge = this->edge(job), convolution = this->convolution(job);
    const int pitch = row_pitch(channels_);
    const A* taps = call_.in.weights + Taps::of(convolution).at(g, edge);
    for (int first = 0; first < channels_; first += t_.slab) {
      if (first) __syncthreads();
      if (!whole()) load_tile(tile, job, first);
      depthwise_tile(region_, t_, call_.in.steps(edge, convolution), memory_.region, slab(first),
                     taps + first, channels_, memory_.depthwise + first, pitch);
    }
    const A* matrix = call_.in.weights + matrix_at(g, edge, convolution);
    T* plane = call_.in.place(call_.kept, call_.unkept, edge, convolution);
    product<T>(memory_.depthwise, pitch, t_.pixels(), channels_, channels_,
               [&](int k, int c) { return matrix[k * channels_ + c]; }, memory_.staged,
               output(tile, plane, job, 0, channels_));
    fold(job);
  }

  const Convolve<T>& call_;
  const Tiling& t_;
  int first_, last_, pools_ = 0;  // of its jobs, the pools are the first
  int channels_;
  ConvolveMemory<A> memory_;
  Region region_;
  bool begins_ = true;
};

template <typename T, int V>
NAS_KERNEL_ALONE convolve(const __grid_constant__ Convolve<T> call) {
  ConvolveBlock<T, V>(call).run();
}

// How the planes that jobs make are cut; `sharing` where several are made from one tile. `bytes`
// tells what a tiling needs.
template <typename T, typename Bytes>
Tiling plan_jobs(const Inputs<T>& in, bool sharing, Bytes&& bytes) {
  const Geometry& g = in.g;
  return plan_tiles(g.images(), g.node_height(), g.node_width(), g.channels(), sharing, bytes);
}
// Numbers of the largest region that the jobs of an input need.
template <typename T>
int64_t largest_region(const Inputs<T>& in, const Jobs& jobs, const Tiling& t) {
  int64_t numbers = 0;
  for (int i = 0; i < jobs.inputs; ++i) {
    numbers = larger(numbers, in.region(jobs, jobs.begin(i), jobs.end[i], t).numbers(t.images));
  }
  return numbers;
}

// Tiles, groups and where sums are; returns the bytes of shared memory that a launch's blocks need.
template <typename T>
int64_t plan(Convolve<T>& call) {
  const auto bytes = [&](const Tiling& t, int jobs) {
    Arena arena(nullptr);
    ConvolveMemory<Sum<T>>::take(arena, t, largest_region(call.in, call.jobs, t), jobs,
                                 call.in.g.channels());
    return arena.used();
  };
  const bool sharing = call.jobs.count > call.jobs.inputs;
  call.tiling = plan_jobs(call.in, sharing, [&](const Tiling& t) { return bytes(t, 0); });
  call.region = largest_region(call.in, call.jobs, call.tiling);
  call.groups = Groups::of(call.jobs, call.tiling.tiles(), Jobs::kMost);
  const bool room = bytes(call.tiling, call.groups.most) <= kSharedBytes;
  call.summed = call.moments && room ? call.groups.most : 0;
  return bytes(call.tiling, call.summed);
}

// Plans and launches; returns the blocks of each job, which leave its moments.
template <int V, typename T>
int run_convolve(Convolve<T>& call, Stream stream) {
  const int64_t bytes = plan(call);
  const int chunks = chunks_for(call.tiling.tiles(), call.groups.count);
  launch(convolve<T, V>, {unsigned(chunks), unsigned(call.groups.count), 1}, bytes, stream, call);
  return chunks;
}

}  // namespace nas::cuda
