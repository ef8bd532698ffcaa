// Blocks of a cluster: their barrier, each other's shared memory, arrivals at each other's barriers.
#include "sim/instructions/cluster.h"

#include <cstring>

#include "sim/async.h"
#include "sim/core.h"

namespace sim {
namespace {

constexpr uint32_t kRankShift = 24;  // a cluster address: rank + 1 above the block's own addresses

void next_phase(Cluster& cluster) {
  if (cluster.missing != 0) return;
  ++cluster.phase;
  cluster.missing = cluster.alive;
}

Block* member(uint32_t rank, const char* what) {
  const Cluster& cluster = *self->block->cluster;
  if (rank >= cluster.size) fail("%s: rank %u in a cluster of %u blocks", what, rank, cluster.size);
  Block* block = cluster.blocks[rank];
  if (block->exited) fail("%s: block %u of the cluster has exited", what, rank);
  return block;
}

unsigned char* pointer(uint32_t address, int bytes, const char* what, Block** block) {
  const uint32_t rank = address >> kRankShift, offset = address & ((1u << kRankShift) - 1);
  if (rank == 0) fail("%s: %#x is no cluster_address", what, address);
  *block = member(rank - 1, what);
  return shared_pointer(*block, offset, static_cast<size_t>(bytes), static_cast<size_t>(bytes), what);
}

void release() {
  drain(self->block->stores);
  drain(self->stores);
}

}  // namespace

void cluster_arrive(bool releases) {
  meet("cluster_arrive", self->warp->present, nullptr, nullptr);
  Cluster& cluster = *self->block->cluster;
  if (self->cluster_waits) fail("cluster_arrive twice without cluster_wait");
  step_aside(8);
  for (auto& entry : self->block->transactions) {
    TransactionBarrier& barrier = entry.second;
    if (barrier.maker == self && barrier.known == Known::kTma) barrier.known = Known::kCluster;
  }
  if (releases) {
    release();
    complete_arrivals(self);
  }
  self->cluster_phase = cluster.phase;
  self->cluster_waits = true;
  --cluster.missing;
  next_phase(cluster);
}

void cluster_wait() {
  meet("cluster_wait", self->warp->present, nullptr, nullptr);
  Thread* thread = self;
  const std::shared_ptr<Cluster> cluster = thread->block->cluster;
  if (!thread->cluster_waits) fail("cluster_wait without cluster_arrive");
  thread->cluster_waits = false;
  spin("cluster barrier", [=] { return cluster->phase > thread->cluster_phase; });
}

void cluster_exit(Thread* thread) {
  Cluster& cluster = *thread->block->cluster;
  --cluster.alive;
  if (thread->cluster_phase != cluster.phase) --cluster.missing;
  next_phase(cluster);
}

uint32_t cluster_address(uint32_t address, uint32_t rank) {
  if (rank >= self->block->cluster->size)
    fail("cluster_address: rank %u in a cluster of %u blocks", rank, self->block->cluster->size);
  return address | (rank + 1) << kRankShift;
}

void cluster_load(uint32_t address, void* value, int bytes) {
  maybe_yield(8);
  Block* block;
  const unsigned char* from = pointer(address, bytes, "cluster_load", &block);
  std::memcpy(value, from, static_cast<size_t>(bytes));
  for (const auto* stores : {&self->block->stores, &self->stores}) {
    for (const LateStore& store : *stores) {
      if (store.dst == from && store.bytes == bytes)
        std::memcpy(value, store.value, static_cast<size_t>(bytes));
    }
  }
}

void cluster_store(uint32_t address, const void* value, int bytes) {
  maybe_yield(8);
  LateStore store{nullptr, {}, bytes, nullptr};
  store.dst = pointer(address, bytes, "cluster_store", &store.block);
  std::memcpy(store.value, value, static_cast<size_t>(bytes));
  self->stores.push_back(store);
}

void cluster_store_async(uint32_t address, const void* value, int bytes, uint32_t barrier) {
  maybe_yield(8);
  Block *block, *same;
  unsigned char* to = pointer(address, bytes, "st.async", &block);
  pointer(barrier, 8, "mbarrier of st.async", &same);
  const uint32_t there = barrier & ((1u << kRankShift) - 1);
  if (block != same)
    fail("st.async to block %u, mbarrier of block %u", block->cluster_rank, same->cluster_rank);
  TransactionBarrier& known = barrier_from_outside(block, there, "st.async");
  LateStore store{to, {}, bytes, block};
  std::memcpy(store.value, value, static_cast<size_t>(bytes));
  const auto complete = [=] {
    std::memcpy(store.dst, store.value, static_cast<size_t>(bytes));
    barrier_complete(block, there, bytes);
  };
  known.cluster |= block != self->block;
  add_bulk({complete, block, "a store", nullptr});
}

void barrier_arrive_cluster(uint32_t address, uint32_t rank, bool ordered) {
  maybe_yield(4);
  if (ordered) release();
  Block* block = member(rank, "mbarrier.arrive at another block");
  TransactionBarrier& known = barrier_from_outside(block, address, "mbarrier.arrive");
  if (ordered) known.cluster |= block != self->block;
  add_bulk({[=] { barrier_arrived(block, address, 0); }, block, "an arrival", self});
}

}  // namespace sim
