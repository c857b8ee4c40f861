#include "workspace.h"

#include <cstdlib>
#include <sys/mman.h>
#include <memory>
#include <new>

namespace nas {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
thread_local std::unique_ptr<void, Free> space;
thread_local int64_t size = 0;

}  // namespace

void* workspace(int64_t bytes) {
  if (bytes > size) {
    release_workspace();
    const int64_t rounded = (bytes + 2097151) / 2097152 * 2097152;
    space.reset(std::aligned_alloc(2097152, static_cast<std::size_t>(rounded)));
    if (!space) throw std::bad_alloc();
    madvise(space.get(), rounded, MADV_HUGEPAGE);
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
