// cp.async, transaction barriers, copies by the TMA unit, asynchronous tensor-core products.
#pragma once

#include <cstdint>

namespace sim {

struct Block;
struct TransactionBarrier;

void copy_async(uint32_t dst, const void* src, int bytes, int valid);
void copy_commit();
void copy_wait(int left);

void barrier_init(uint32_t address, int count);
// The barriers that this thread has initialised: the TMA unit may use them, and once the thread has arrived
// at the cluster's barrier, other blocks.
void barrier_init_fence();
// One arrival, which also announces bytes.
void barrier_arrive(uint32_t address, int64_t bytes);
// At the barrier of another block, some time later.
// ordered: what the thread stored before is there for those that wait at the scope of the cluster.
void barrier_arrive_cluster(uint32_t address, uint32_t rank, bool ordered);
// The barrier of a block, for whoever is not a thread of it. Fails unless that was fenced.
TransactionBarrier& barrier_from_outside(Block* block, uint32_t address, const char* what);
void barrier_arrived(Block* block, uint32_t address, int64_t bytes);
void barrier_complete(Block* block, uint32_t address, int64_t bytes);
// `cluster`: the wait also orders what threads of other blocks did before they arrived.
void barrier_wait(uint32_t address, unsigned parity, bool cluster);
bool barrier_test(uint32_t address, unsigned parity, bool cluster);

// Ordinary stores to shared memory, of this and all other threads so far, become visible to wgmma.
void fence_async_proxy();
// Shared memory as wgmma sees it.
unsigned char* async_view(Block* block);

// One warp's share of a wgmma: 16 rows of D, in the registers `d` of each lane (count each).
struct WarpgroupOperands {
  float* d;
  const uint32_t* a;  // registers of this lane, or null: then descriptor_a
  uint64_t descriptor_a, descriptor_b;
  int n;           // columns
  bool a_columns;  // A, B with M or N as the contiguous dimension
  bool b_columns;
  bool accumulate;
  float (*value)(uint16_t bits);
};
void product_issue(WarpgroupOperands operands);
void product_fence();
void product_commit();
void product_wait(int left);

}  // namespace sim
