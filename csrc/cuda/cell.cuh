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
// Whether images can be read `width` numbers at a time.
inline bool is_wide(const CellShape& shape, int width) {
  return shape.mixed() % width == 0 && shape.before_channels % width == 0 &&
         shape.previous_channels % width == 0;
}
template <typename T, typename P>
bool is_wide(const CellForward<T, P>& c, int width) {
  return is_wide(c.shape, width) &&
         is_aligned({c.before, c.previous, c.output, c.states, c.kept});
}
template <typename T, typename P>
bool is_wide(const CellBackward<T, P>& c, int width) {
  return is_wide(c.shape, width) &&
         is_aligned({c.before, c.previous, c.output, c.states, c.kept, c.output_gradient,
                     c.before_gradient, c.previous_gradient});
}
template <typename T, typename P>
bool is_wide(const StemForward<T, P>& c, int width) {
  return c.shape.outputs % width == 0 && is_aligned({c.images, c.output, c.convolution});
}
template <typename T, typename P>
bool is_wide(const StemBackward<T, P>& c, int width) {
  return c.shape.outputs % width == 0 &&
         is_aligned({c.images, c.output_gradient, c.convolution});
}

// Calls f with a pass over `call` that takes so many numbers at a time, or else the next narrower.
template <template <typename, int> typename Pass, typename T, int kWidth, int... kNarrower,
          typename Call, typename F>
auto with_pass(const Call& call, void* workspace, Stream stream, const F& f) {
  if constexpr (sizeof...(kNarrower) > 0) {
    if (!is_wide(call, kWidth)) {
      return with_pass<Pass, T, kNarrower...>(call, workspace, stream, f);
    }
  }
  Pass<T, kWidth> pass(call, workspace, stream);
  return f(pass);
}
// Of a cell. The first ones of PC-DARTS mix 4 channels: in half precision these are 8 bytes.
template <template <typename, int> typename Pass, typename T, typename Call, typename F>
auto with_cell(const Call& call, void* workspace, Stream stream, const F& f) {
  constexpr int kLess = kWide<T> > 4 ? 4 : kWide<T>;
  return with_pass<Pass, T, kWide<T>, kLess, 1>(call, workspace, stream, f);
}
template <template <typename, int> typename Pass, typename T, typename Call, typename F>
auto with_stem(const Call& call, void* workspace, Stream stream, const F& f) {
  return with_pass<Pass, T, kWide<T>, 1>(call, workspace, stream, f);
}

template <typename T>
int64_t workspace_bytes(const CellForward<T, Sum<T>>& call) {
  return with_cell<Forward, T>(call, nullptr, {}, [](auto& p) { return p.workspace_bytes(); });
}
template <typename T>
void run(const CellForward<T, Sum<T>>& call, void* workspace, Stream stream) {
  with_cell<Forward, T>(call, workspace, stream, [](auto& pass) { pass.run(); });
}
template <typename T>
int64_t workspace_bytes(const CellBackward<T, Sum<T>>& call) {
  return with_cell<Backward, T>(call, nullptr, {}, [](auto& p) { return p.workspace_bytes(); });
}
template <typename T>
void run(const CellBackward<T, Sum<T>>& call, void* workspace, Stream stream) {
  with_cell<Backward, T>(call, workspace, stream, [](auto& pass) { pass.run(); });
}
template <typename T>
int64_t workspace_bytes(const StemForward<T, Sum<T>>& call) {
  return with_stem<StemForwardPass, T>(call, nullptr, {}, [](auto& p) { return p.workspace_bytes(); });
}
template <typename T>
void run(const StemForward<T, Sum<T>>& call, void* workspace, Stream stream) {
  with_stem<StemForwardPass, T>(call, workspace, stream, [](auto& pass) { pass.run(); });
}
template <typename T>
int64_t workspace_bytes(const StemBackward<T, Sum<T>>& call) {
  return with_stem<StemBackwardPass, T>(call, nullptr, {}, [](auto& p) { return p.workspace_bytes(); });
}
template <typename T>
void run(const StemBackward<T, Sum<T>>& call, void* workspace, Stream stream) {
  with_stem<StemBackwardPass, T>(call, workspace, stream, [](auto& pass) { pass.run(); });
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
