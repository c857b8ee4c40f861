// Memory that the kernels compute in. It is kept from call to call, since fresh memory costs a page
// fault every 4 KiB, and grows to what the largest cell needs.

#pragma once

#include <cstdint>

namespace nas {

// At least `bytes` bytes, 64-byte aligned, the calling thread's own; valid until its next call.
void* workspace(int64_t bytes);

// Gives the calling thread's memory back.
void release_workspace();

int64_t workspace_size();

}  // namespace nas
