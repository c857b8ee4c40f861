// Memory that the kernels compute in, and what they keep between the passes. All of it is used again
// from call to call, since fresh memory costs a page fault every 4 KiB.

#pragma once

#include <cstdint>

namespace nas {

// At least `bytes` bytes, 64-byte aligned, the calling thread's own; valid until its next call.
// Grows to what the largest cell needs.
void* workspace(int64_t bytes);
int64_t workspace_size();

// A piece of `bytes` bytes for as long as the borrower wants, from any thread to any thread.
void* borrow(int64_t bytes);
void give_back(void* piece, int64_t bytes);

// Gives the calling thread's workspace and all pieces that nobody borrows back to the system.
void release_workspace();

}  // namespace nas
