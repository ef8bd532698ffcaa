// Global memory: guarded buffers for tests, and stores that other blocks see only after a fence.
#pragma once

#include <cstddef>

namespace sim {

// Poisoned bytes, flush with the guard page after them (at_end) or before them.
void* allocate(size_t bytes, size_t alignment, bool at_end);
// False if something was written beside the buffer.
bool release(void* p, size_t bytes);

void store_late(void* dst, const void* value, int bytes);
void load_late(const void* src, void* value, int bytes);
void fence();
// Fails the launch if a vector access is not aligned.
void check_aligned(const void* p, size_t alignment, const char* what);

}  // namespace sim
