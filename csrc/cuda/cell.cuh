// Makes the functions of kernels.h for one kind of number; a file for each includes this.

#pragma once

#include <initializer_list>

#include "backward.cuh"
#include "forward.cuh"
#include "kernels.h"
#include "stem.cuh"

namespace nas::cuda {

// Whether 16 bytes can be read at once from each of these on.
inline bool is_aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return false;
  }
  return true;
}
// Whether images can be read 16 bytes at a time.
template <typename T>
bool is_wide(const CellShape& shape) {
  return shape.mixed() % kWide<T> == 0 && shape.before_channels % kWide<T> == 0 &&
         shape.previous_channels % kWide<T> == 0;
}
template <typename T>
bool is_wide(const CellForward<T, Sum<T>>& c) {
  return is_wide<T>(c.shape) && is_aligned({c.before, c.previous, c.output, c.states, c.kept});
}
template <typename T>
bool is_wide(const CellBackward<T, Sum<T>>& c) {
  return is_wide<T>(c.shape) &&
         is_aligned({c.before, c.previous, c.output, c.states, c.kept, c.output_gradient,
                     c.before_gradient, c.previous_gradient});
}
template <typename T>
bool is_wide(const StemForward<T, Sum<T>>& c) {
  return c.shape.outputs % kWide<T> == 0 && is_aligned({c.images, c.output, c.convolution});
}
template <typename T>
bool is_wide(const StemBackward<T, Sum<T>>& c) {
  return c.shape.outputs % kWide<T> == 0 &&
         is_aligned({c.images, c.output_gradient, c.convolution});
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
template <typename T>
int64_t workspace_bytes(const StemForward<T, Sum<T>>& call) {
  return with_pass<StemForwardPass, T>(call, nullptr, {}, [](auto& p) { return p.workspace_bytes(); });
}
template <typename T>
void run(const StemForward<T, Sum<T>>& call, void* workspace, Stream stream) {
  with_pass<StemForwardPass, T>(call, workspace, stream, [](auto& pass) { pass.run(); });
}
template <typename T>
int64_t workspace_bytes(const StemBackward<T, Sum<T>>& call) {
  return with_pass<StemBackwardPass, T>(call, nullptr, {}, [](auto& p) { return p.workspace_bytes(); });
}
template <typename T>
void run(const StemBackward<T, Sum<T>>& call, void* workspace, Stream stream) {
  with_pass<StemBackwardPass, T>(call, workspace, stream, [](auto& pass) { pass.run(); });
}

}  // namespace nas::cuda

#define NAS_KERNELS_FOR_CALL(Call, T)                    \
  template int64_t workspace_bytes<T>(const Call<T, Sum<T>>&); \
  template void run<T>(const Call<T, Sum<T>>&, void*, Stream);
#define NAS_KERNELS_FOR(T)              \
  NAS_KERNELS_FOR_CALL(CellForward, T)  \
  NAS_KERNELS_FOR_CALL(CellBackward, T) \
  NAS_KERNELS_FOR_CALL(StemForward, T)  \
  NAS_KERNELS_FOR_CALL(StemBackward, T)
