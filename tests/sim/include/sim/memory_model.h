// Global memory: guarded buffers for tests, what of them a thread may touch, and stores that other blocks see
// only after a fence.
//
// A dependent launch runs beside the launch before it until a thread calls grid_wait. Before that the thread
// may touch nothing that the launch before writes, and it may write nothing at all: that launch, or those
// before it if it is a dependent one too, may still use the memory. Whatever the schedule, such an access
// fails. (Stricter than PTX: a thread that has waited does not speak for the others of its block.)
#pragma once

#include <cstddef>
#include <cstdint>

namespace sim {

// Poisoned bytes, flush with the guard page after them (at_end) or before them.
void* allocate(size_t bytes, size_t alignment, bool at_end);
// Rows of a matrix that is far larger than memory: row i begins i * stride bytes behind what is returned, and
// rows first to first + rows - 1 exist, the last one flush with a guard page. What lies between them faults
// from the next page on.
void* allocate_rows(size_t first, size_t rows, size_t bytes, size_t stride, size_t alignment);
// False if something was written beside the buffer.
bool release(void* p);

// The launch before the next one writes the buffer at `p`.
void written_before(void* p);
// Around a launch. Which buffers it writes is noted, for the next one.
void open_memory(bool dependent);
void close_memory();
// A thread goes on that has not waited: what others were allowed is taken back.
void hide_memory();
// Of a fault: null if the access may go on, else what is wrong with it.
const char* judge(const void* address);
// What an instruction reads, or stores, on behalf of the calling thread at some later time.
void check_read(const void* p, const char* what);
void check_store(const char* what);

void store_late(void* dst, const void* value, int bytes);
void load_late(const void* src, void* value, int bytes);
void fence();
// Fails the launch if a vector access is not aligned.
void check_aligned(const void* p, size_t alignment, const char* what);

}  // namespace sim
