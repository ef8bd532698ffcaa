// Barriers of a block and of a cluster.
#pragma once

namespace sim {

// `threads` threads of the block meet at barrier `id`; those with waits = false go on at once.
void barrier(int id, int threads, bool waits);
void cluster_arrive();
void cluster_wait();

}  // namespace sim
