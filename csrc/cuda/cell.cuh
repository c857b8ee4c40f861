// Makes the functions of kernels.h for one kind of number; a file for each includes this.

#pragma once

#include <initializer_list>

#include "backward.cuh"
#include "forward.cuh"
#include "kernels.h"

namespace nas::cuda {

// Whether numbers can be read 16 bytes at a time.
template <typename T>
bool is_wide(const CellShape& shape, std::initializer_list<const T*> pointers) {
  for (const T* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return false;
  }
  return shape.mixed() % kWide<T> == 0 && shape.before_channels % kWide<T> == 0 &&
         shape.previous_channels % kWide<T> == 0;
}
template <typename T>
bool is_wide(const CellForward<T, Sum<T>>& c) {
  return is_wide<T>(c.shape, {c.before, c.previous, c.output, c.states, c.kept});
}
template <typename T>
bool is_wide(const CellBackward<T, Sum<T>>& c) {
  return is_wide<T>(c.shape, {c.before, c.previous, c.output, c.states, c.kept, c.output_gradient,
                              c.before_gradient, c.previous_gradient});
}

// Calls f with a pass over `call`, many numbers at a time where they can be.
template <template <typename, int> typename Pass, typename T, typename Call, typename F>
auto with_pass(const Call& call, void* workspace, Stream stream, F&& f) {
  if (is_wide<T>(call)) {
    Pass<T, kWide<T>> pass(call, workspace, stream);
    return f(pass);
  }
  Pass<T, 1> pass(call, workspace, stream);
  return f(pass);
}

template <typename T>
int64_t workspace_bytes(const CellForward<T, Sum<T>>& call) {
  return with_pass<Forward, T>(call, nullptr, {}, [](auto& p) { return p.workspace_bytes(); });
}
template <typename T>
void run(const CellForward<T, Sum<T>>& call, void* workspace, Stream stream) {
  with_pass<Forward, T>(call, workspace, stream, [](auto& pass) { pass.run(); });
}
template <typename T>
int64_t workspace_bytes(const CellBackward<T, Sum<T>>& call) {
  return with_pass<Backward, T>(call, nullptr, {}, [](auto& p) { return p.workspace_bytes(); });
}
template <typename T>
void run(const CellBackward<T, Sum<T>>& call, void* workspace, Stream stream) {
  with_pass<Backward, T>(call, workspace, stream, [](auto& pass) { pass.run(); });
}

}  // namespace nas::cuda

#define NAS_KERNELS_FOR(T)                                                                   \
  template int64_t workspace_bytes<T>(const CellForward<T, Sum<T>>&);        \
  template void run<T>(const CellForward<T, Sum<T>>&, void*, Stream);        \
  template int64_t workspace_bytes<T>(const CellBackward<T, Sum<T>>&);       \
  template void run<T>(const CellBackward<T, Sum<T>>&, void*, Stream);
