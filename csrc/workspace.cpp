#include "workspace.h"

#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nas {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
thread_local std::unique_ptr<void, Free> space;
thread_local int64_t size = 0;

}  // namespace

void* workspace(int64_t bytes) {
  constexpr int64_t kPage = 2 << 20;  // large pages spare the processor most address translations
  if (bytes > size) {
    release_workspace();
    const int64_t rounded = (bytes + kPage - 1) / kPage * kPage;
    space.reset(std::aligned_alloc(kPage, static_cast<std::size_t>(rounded)));
    if (!space) throw std::bad_alloc();
#if defined(__linux__)
    madvise(space.get(), static_cast<std::size_t>(rounded), MADV_HUGEPAGE);
#endif
    size = rounded;
  }
  return space.get();
}

void release_workspace() {
  space.reset();
  size = 0;
}

int64_t workspace_size() { return size; }

}  // namespace nas
