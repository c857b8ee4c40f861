// The kernels of a GPU, for all kinds of numbers that images are stored in: double, float, Tf32,
// BFloat16 and Half.

#pragma once

#include "../cell.h"
#include "../stem.h"
#include "number.h"

namespace nas::cuda {

// Numbers of what a forward pass keeps.
int64_t kept_numbers(const CellShape& shape);

// The memory that a call needs, and the call, which only adds to the stream: it neither waits nor
// allocates. `workspace` is 16-byte aligned.
template <typename T>
int64_t workspace_bytes(const CellForward<T, Sum<T>>& call);
template <typename T>
void run(const CellForward<T, Sum<T>>& call, void* workspace, Stream stream);
template <typename T>
int64_t workspace_bytes(const CellBackward<T, Sum<T>>& call);
template <typename T>
void run(const CellBackward<T, Sum<T>>& call, void* workspace, Stream stream);
template <typename T>
int64_t workspace_bytes(const StemForward<T, Sum<T>>& call);
template <typename T>
void run(const StemForward<T, Sum<T>>& call, void* workspace, Stream stream);
template <typename T>
int64_t workspace_bytes(const StemBackward<T, Sum<T>>& call);
template <typename T>
void run(const StemBackward<T, Sum<T>>& call, void* workspace, Stream stream);

}  // namespace nas::cuda
