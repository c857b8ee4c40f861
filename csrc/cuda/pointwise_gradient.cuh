// Backward through the pointwise part of convolutions, with the gradients of their matrices, for
// which the depthwise part is computed again. As forward, the convolutions of an edge share a read
// of its input, where their matrices are small enough.

#pragma once

#include "gradient.cuh"
#include "matrix.cuh"

namespace nas::cuda {

// Whether a block takes several convolutions of an edge. It then adds to matrices in global memory
// after each tile, which pays where a matrix is much smaller than the tile.
NAS_BOTH bool shares_inputs(int channels) { return channels * channels <= kNumbers / 4; }

// Which planes the convolutions of a launch read and write, by job.
template <typename T>
struct ConvolutionGradient {
  Inputs<T> in;
  Jobs jobs;
  Groups groups;
  Tiling tiling;
  int64_t region;              // numbers of a group's largest
  bool sharing;                // blocks take several jobs
  const Sum<T>* coefficients;  // [edge][convolution][3][channels]
  const Sum<T>* node;          // the node's gradient
  const Sum<T>* between;       // gradients between two convolutions, [edge's source][3 or 5]
  Sum<T>* depthwise;           // of each job: the gradient of its depthwise output
  Sum<T>* matrices;            // [job][chunk][channels][channels], or null: nobody asks

  NAS_DEVICE Coefficients<Sum<T>> coefficients_of(int edge, int convolution) const {
    const int channels = in.g.channels();
    return {coefficients + (int64_t(edge) * kConvolutions + convolution) * 3 * channels, channels};
  }
  // The gradient of what a convolution was normalised to.
  NAS_DEVICE const Sum<T>* gradient_of(int edge, int convolution) const {
    if (convolution != kSep3A && convolution != kSep5A) return node;
    return between + (2 * source_of(edge) + convolution / 2) * in.g.plane();
  }
};

template <typename A>
struct GradientMemory {
  A *region, *depthwise, *gradient, *staged;
  A* scratch;  // of a matrix's gradient, when the depthwise output is done with
  int* places;

  NAS_BOTH static GradientMemory take(Arena& arena, const Tiling& t, int64_t region, int channels,
                                      bool matrices, bool sharing) {
    const int64_t tile = int64_t(t.pixels()) * row_pitch(channels), outer = kOuter;
    GradientMemory memory;
    memory.region = arena.take<A>(!matrices ? 0 : sharing ? region : larger(region, outer));
    memory.depthwise = arena.take<A>(!matrices ? 0 : sharing ? larger(tile, outer) : tile);
    memory.scratch = sharing ? memory.depthwise : memory.region;
    memory.gradient = arena.take<A>(tile);
    memory.staged = arena.take<A>(staged_numbers(channels));
    memory.places = arena.take<int>(t.pixels());
    return memory;
  }
};

// The work of one block.
template <typename T, int V>
class PointwiseGradientBlock {
  using A = Sum<T>;

 public:
  NAS_DEVICE explicit PointwiseGradientBlock(const ConvolutionGradient<T>& call)
      : call_(call), t_(call.tiling), first_(call.groups.first[blockIdx.y]),
        last_(call.groups.last[blockIdx.y]), channels_(call.in.g.channels()),
        pitch_(row_pitch(channels_)) {
    Arena arena(shared_memory());
    memory_ = GradientMemory<A>::take(arena, t_, call.region, channels_, call.matrices,
                                      call.sharing);
    region_ = call.in.region(call.jobs, first_, last_, t_);
  }

  NAS_DEVICE void run() {
    const Span span = Span::of(t_.tiles(), int(gridDim.x), int(blockIdx.x));
    clear_padding(memory_.gradient, t_.pixels(), channels_, pitch_);
    for (int64_t index = span.first; index < span.last; ++index) {
      const Tile tile = Tile::of(t_, index);
      find_places(t_, tile, memory_.places);
      if (call_.matrices && whole()) load_tile(tile, first_, 0);
      __syncthreads();
      for (int job = first_; job < last_; ++job) {
        load_gradient(tile, job);
        if (call_.matrices) add_matrix(tile, job, index > span.first);
        send_back(tile, job);
      }
    }
  }

 private:
  NAS_DEVICE int edge(int job) const { return call_.jobs.edge[job]; }
  NAS_DEVICE int convolution(int job) const { return call_.jobs.convolution[job]; }
  NAS_DEVICE bool whole() const { return t_.slab >= channels_; }
  NAS_DEVICE int slab(int first) const { return smaller(t_.slab, channels_ - first); }

  NAS_DEVICE void load_tile(const Tile& tile, int job, int first) const {
    load_input<V>(call_.in, edge(job), convolution(job), region_, t_, tile, first, slab(first),
                  memory_.region);
  }

  // The gradient of what the convolution gave; zeros outside of the plane.
  NAS_DEVICE void load_gradient(const Tile& tile, int job) const {
    const int across = channels_ / V;
    const int64_t start = tile.start(t_);
    const Plane<const T> outputs = call_.in.plane(edge(job), convolution(job));
    const A* gradients = call_.gradient_of(edge(job), convolution(job));
    const Coefficients<A> coefficients = call_.coefficients_of(edge(job), convolution(job));
    for (int i = int(threadIdx.x); i < t_.pixels() * across; i += kThreads) {
      const int p = i / across, channel = i % across * V;
      const int place = memory_.places[p];
      A gradient[V] = {}, output[V];
      if (place >= 0) {
        load<V>(gradients + (start + place) * channels_ + channel, gradient);
        load<V>(outputs.pixel(start + place) + channel, output);
        NAS_UNROLL for (int v = 0; v < V; ++v) {
          gradient[v] = coefficients(gradient[v], output[v], channel + v);
        }
      }
      NAS_UNROLL for (int v = 0; v < V; ++v) {
        memory_.gradient[p * pitch_ + channel + v] = gradient[v];
      }
    }
  }

  // What the tile adds to the gradient of the job's matrix.
  NAS_DEVICE void add_matrix(const Tile& tile, int job, bool begun) const {
    const Steps steps = call_.in.steps(edge(job), convolution(job));
    const A* taps = call_.in.weights + Taps::of(convolution(job)).at(call_.in.g, edge(job));
    for (int first = 0; first < channels_; first += t_.slab) {
      if (!whole()) {
        load_tile(tile, job, first);
        __syncthreads();
      }
      depthwise_tile(region_, t_, steps, memory_.region, slab(first), taps + first, channels_,
                     memory_.depthwise + first, pitch_);
      __syncthreads();
    }
    const int64_t block = int64_t(job) * gridDim.x + blockIdx.x;
    MatrixGradient<T> sums(channels_, channels_, channels_,
                           call_.matrices + block * channels_ * channels_, begun);
    sums.add(memory_.depthwise, pitch_, memory_.gradient, pitch_, t_.pixels());
    __syncthreads();
    sums.finish(memory_.scratch);
  }

  // The gradient of the depthwise output.
  NAS_DEVICE void send_back(const Tile& tile, int job) const {
    const A* matrix = call_.in.weights + matrix_at(call_.in.g, edge(job), convolution(job));
    A* plane = call_.depthwise + job * call_.in.g.plane();
    product<T>(memory_.gradient, pitch_, t_.pixels(), channels_, channels_,
               [&](int k, int c) { return matrix[c * channels_ + k]; }, memory_.staged,
               Stored<V, A>{plane + tile.start(t_) * channels_, memory_.places, t_.pixels(),
                            channels_, 0, channels_});
  }

  const ConvolutionGradient<T>& call_;
  const Tiling& t_;
  int first_, last_;  // of its jobs
  int channels_, pitch_;
  GradientMemory<A> memory_;
  Region region_;
};

template <typename T, int V>
NAS_KERNEL_ALONE
    pointwise_gradient(const __grid_constant__ ConvolutionGradient<T> call) {
  PointwiseGradientBlock<T, V>(call).run();
}

// Plans and launches; returns the blocks of each job, which leave parts of its matrix's gradient.
template <int V, typename T>
int run_pointwise_gradient(ConvolutionGradient<T>& call, Stream stream) {
  const int channels = call.in.g.channels();
  call.sharing = call.matrices && shares_inputs(channels);
  const auto bytes = [&](const Tiling& t) {
    Arena arena(nullptr);
    GradientMemory<Sum<T>>::take(arena, t, largest_region(call.in, call.jobs, t), channels,
                                 call.matrices, call.sharing);
    return arena.used();
  };
  call.tiling = plan_jobs(call.in, call.sharing, bytes);
  call.region = largest_region(call.in, call.jobs, call.tiling);
  call.groups = Groups::of(call.jobs, call.tiling.tiles(), call.sharing ? kFirst : 1);
  const int chunks = chunks_for(call.tiling.tiles(), call.groups.count);
  launch(pointwise_gradient<T, V>, {unsigned(chunks), unsigned(call.groups.count), 1},
         bytes(call.tiling), stream, call);
  return chunks;
}

}  // namespace nas::cuda
