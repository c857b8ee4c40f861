#include "workspace.h"

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nas {
namespace {

constexpr int64_t kPage = 2 << 20;  // large pages spare the processor most address translations

int64_t whole_pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// What does not fill a large page is in small ones, which take no memory until they are written to.
void* allocate(int64_t bytes) {
  void* memory = std::aligned_alloc(kPage, static_cast<std::size_t>(whole_pages(bytes)));
  if (!memory) throw std::bad_alloc();
#if defined(__linux__)
  madvise(memory, static_cast<std::size_t>(bytes / kPage * kPage), MADV_HUGEPAGE);
#endif
  return memory;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

thread_local Memory space;
thread_local int64_t size = 0;

std::mutex lending;
std::multimap<int64_t, Memory> idle;  // pieces that nobody borrows, by their whole pages

}  // namespace

void* workspace(int64_t bytes) {
  if (bytes > size) {
    space.reset();
    size = 0;
    space.reset(allocate(bytes));
    size = whole_pages(bytes);
  }
  return space.get();
}

int64_t workspace_size() { return size; }

void* borrow(int64_t bytes) {
  {
    const std::lock_guard<std::mutex> guard(lending);
    // The one that came back last, so that each use finds its own again.
    auto found = idle.upper_bound(whole_pages(bytes));
    if (found != idle.begin() && (--found)->first == whole_pages(bytes)) {
      void* piece = found->second.release();
      idle.erase(found);
      return piece;
    }
  }
  return allocate(bytes);
}

void give_back(void* piece, int64_t bytes) {
  const std::lock_guard<std::mutex> guard(lending);
  idle.emplace(whole_pages(bytes), Memory(piece));
}

void release_workspace() {
  space.reset();
  size = 0;
  const std::lock_guard<std::mutex> guard(lending);
  idle.clear();
}

}  // namespace nas
