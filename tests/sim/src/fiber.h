// Switching between stacks.
#pragma once

#include <cstddef>

namespace sim {

// A fiber that starts in `entry` on the given stack when it is first switched to.
void* make_fiber(void* stack, size_t bytes, void (*entry)());
// Saves where the caller is in *from, goes on at `to`.
void switch_fiber(void** from, void* to);

}  // namespace sim
