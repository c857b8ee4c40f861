// Runs CUDA kernels on the host, so that csrc/cuda is tested where there is no GPU.
//
// Blocks run in turn. The threads of a block are fibers: each runs until it waits for the others,
// at a barrier or in a shuffle. The address sanitizer is told of every switch of stacks. So is the
// thread sanitizer, to which fibers are threads that only barriers and the end of a launch put in
// order: a missing __syncthreads() and blocks that write to the same place are reported as races.
// A shuffle orders nothing, for CUDA promises no more than what it gives. Shared memory is exactly
// as large as the launch asked for and starts as NaN. Accesses of several numbers have to be aligned,
// and those to other memory are counted by their bytes.
//
// A kernel may use what is declared here and nothing else. Slow, and no part of the package.

#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // blocks run in turn

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// What the machine itself does is no part of what the thread sanitizer looks at.
#define EMULATION_QUIET __attribute__((no_sanitize("thread")))

namespace emulation {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 256 << 10;
constexpr std::size_t kSlot = 32;  // bytes that a thread can give the others of its warp

#if defined(__x86_64__)

// A stack that is not running: where its registers were pushed.
using Context = void*;

// Some ten times faster than swapcontext, which asks the system for the signal mask.
EMULATION_QUIET inline __attribute__((naked, noinline)) void switch_stack(Context*, Context) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
EMULATION_QUIET inline void switch_to(Context& from, Context& to) { switch_stack(&from, to); }
inline void prepare(Context& context, char* stack, void (*run)()) {
  auto** top = reinterpret_cast<void**>((reinterpret_cast<std::uintptr_t>(stack) + kStack) & ~15ul);
  *--top = nullptr;  // where `run` would return to
  *--top = reinterpret_cast<void*>(run);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}

#else

using Context = ucontext_t;

EMULATION_QUIET inline void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
inline void prepare(Context& context, char* stack, void (*run)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, run, 0);
}

#endif

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  bool done = false;
  void* sanitizer = nullptr;  // the stack or thread that a sanitizer knows it by
};

class Machine {
 public:
  EMULATION_QUIET static Machine& get() {
    static Machine machine;
    return machine;
  }

  EMULATION_QUIET void launch(dim3 grid, dim3 block, std::size_t shared,
                              const std::function<void()>& kernel) {
    if (block.y != 1 || block.z != 1 || block.x > 1024) throw std::runtime_error("block too large");
    if (shared > 99 << 10) throw std::runtime_error("more shared memory than every sm_80 has");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) throw std::runtime_error("empty grid");
    if (grid.y > 0xffff || grid.z > 0xffff) throw std::runtime_error("grid too large");
    grid_ = grid;
    block_ = block;
    kernel_ = &kernel;
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          block_index_ = {x, y, z};
          run_block(shared);
        }
      }
    }
    acquire(&end_);
    shared_memory_.clear();
    if (misaligned_) throw std::runtime_error("an access of several numbers is not aligned");
  }

  EMULATION_QUIET const dim3& grid() const { return grid_; }
  EMULATION_QUIET const dim3& block() const { return block_; }
  EMULATION_QUIET const dim3& block_index() const { return block_index_; }
  EMULATION_QUIET const dim3& thread_index() const { return current_->index; }
  EMULATION_QUIET void* shared() { return shared_; }

  // Waits for all threads of the block that have not ended.
  EMULATION_QUIET void barrier() {
    release(&block_barrier_);
    wait(block_barrier_, block_.x - ended_);
    acquire(&block_barrier_);
  }

  // Notes that so many bytes are read or written at once, for which a GPU has to find them at a
  // multiple of their number.
  EMULATION_QUIET void touches(const void* at, std::size_t bytes) {
    misaligned_ |= reinterpret_cast<std::uintptr_t>(at) % bytes != 0;
    const auto* byte = static_cast<const char*>(at);
    if (byte < shared_ || byte >= shared_ + shared_bytes_) ++touched[bytes];
  }
  std::int64_t touched[17] = {};  // how often, by bytes

  // What the thread of the same warp with its lane xor `mask` gave.
  template <typename V>
  EMULATION_QUIET V shuffle_xor(V value, int mask) {
    V all[kWarp];
    gather(value, all);
    return all[(current_->index.x % kWarp) ^ static_cast<unsigned>(mask)];
  }

  // What all threads of the warp gave, by lane.
  template <typename V>
  EMULATION_QUIET void gather(const V& value, V (&all)[kWarp]) {
    static_assert(sizeof(V) <= kSlot);
    Warp& own = warps_[current_->index.x / kWarp];
    std::memcpy(own.slots[current_->index.x % kWarp], &value, sizeof(V));
    wait(own.barrier, kWarp);
    for (int lane = 0; lane < kWarp; ++lane) std::memcpy(&all[lane], own.slots[lane], sizeof(V));
    wait(own.barrier, kWarp);
  }

 private:
  struct Barrier {
    unsigned arrived = 0, generation = 0;
  };
  struct Warp {
    Barrier barrier;
    unsigned char slots[kWarp][kSlot];
  };

  EMULATION_QUIET void run_block(std::size_t shared) {
    // until the launch ends: the thread sanitizer knows of no order between blocks
    shared_memory_.emplace_back(new char[shared ? shared : 1]);
    shared_ = shared_memory_.back().get();
    shared_bytes_ = shared;
    std::memset(shared_, 0xff, shared);
    second_ = !second_;
    auto& fibers = fibers_[second_];
    ended_ = 0;
    block_barrier_ = {};
    warps_.assign((block_.x + kWarp - 1) / kWarp, {});
    while (fibers.size() < block_.x) fibers.push_back(std::make_unique<Fiber>());
    for (unsigned x = 0; x < block_.x; ++x) start(*fibers[x], x);
    for (unsigned left = block_.x; left;) {
      const unsigned before = left;
      moved_ = false;
      for (unsigned x = 0; x < block_.x; ++x) {
        Fiber& fiber = *fibers[x];
        if (fiber.done) continue;
        enter(fiber);
        left -= fiber.done;
      }
      if (left == before && !moved_) throw std::runtime_error("threads of a block wait forever");
    }
  }

  EMULATION_QUIET void wait(Barrier& barrier, unsigned count) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      ++barrier.generation;
      moved_ = true;
    }
    while (barrier.generation == generation) leave();
  }

  EMULATION_QUIET static void run_fiber() {
    Machine& machine = get();
    machine.entered(nullptr);
    machine.acquire(&machine);
    (*machine.kernel_)();
    machine.release(&machine.end_);
    machine.current_->done = true;
    ++machine.ended_;
    machine.leave();
  }

  EMULATION_QUIET void start(Fiber& fiber, unsigned x) {
    fiber.done = false;
    fiber.index = {x, 0, 0};
    prepare(fiber.context, fiber.stack.get(), run_fiber);
#if defined(__SANITIZE_THREAD__)
    if (!fiber.sanitizer) fiber.sanitizer = __tsan_create_fiber(0);
    main_ = __tsan_get_current_fiber();
#endif
    release(this);
  }

  EMULATION_QUIET void enter(Fiber& fiber) {
    current_ = &fiber;
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fiber.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fiber.stack.get(), kStack);
    switch_to(main_context_, fiber.context);
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#else
    switch_to(main_context_, fiber.context);
#endif
  }
  EMULATION_QUIET void leave() {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(main_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* own = nullptr;
    __sanitizer_start_switch_fiber(current_->done ? nullptr : &own, main_stack_, main_size_);
    switch_to(current_->context, main_context_);
    entered(own);
#else
    switch_to(current_->context, main_context_);
#endif
  }
  EMULATION_QUIET void entered(void* own) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own, &main_stack_, &main_size_);
#endif
    (void)own;
  }

  EMULATION_QUIET void release(void* at) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(at);
#endif
    (void)at;
  }
  EMULATION_QUIET void acquire(void* at) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(at);
#endif
    (void)at;
  }

  dim3 grid_, block_, block_index_;
  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_[2];  // of two blocks in turn: others than before
  bool second_ = false;
  std::vector<Warp> warps_;
  Barrier block_barrier_;
  Fiber* current_ = nullptr;
  Context main_context_;
  const void* main_stack_ = nullptr;
  std::size_t main_size_ = 0;
  void* main_ = nullptr;
  char* shared_ = nullptr;
  std::size_t shared_bytes_ = 0;
  std::vector<std::unique_ptr<char[]>> shared_memory_;
  char end_ = 0;  // known by its address: where all threads of a launch have ended
  unsigned ended_ = 0;
  bool moved_ = false, misaligned_ = false;
};

}  // namespace emulation

#define threadIdx (::emulation::Machine::get().thread_index())
#define blockIdx (::emulation::Machine::get().block_index())
#define blockDim (::emulation::Machine::get().block())
#define gridDim (::emulation::Machine::get().grid())

inline void __syncthreads() { ::emulation::Machine::get().barrier(); }
template <typename V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  return ::emulation::Machine::get().shuffle_xor(value, mask);
}
