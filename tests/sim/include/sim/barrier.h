// Barriers of a block.
#pragma once

namespace sim {

// `threads` threads of the block meet at barrier `id`; those with waits = false go on at once.
void barrier(int id, int threads, bool waits);

}  // namespace sim
