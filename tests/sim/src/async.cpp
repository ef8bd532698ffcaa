// cp.async, transaction barriers, shared memory as wgmma sees it.
#include "sim/async.h"

#include <cstring>

#include "sim/core.h"
#include "sim/memory_model.h"

namespace sim {
namespace {

bool passed(const TransactionBarrier& barrier, unsigned parity) {
  return barrier.phase != (parity & 1);
}

void maybe_flip(TransactionBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.count;
}

TransactionBarrier& find(Block* block, uint32_t address, const char* what) {
  auto at = block->transactions.find(address);
  if (at == block->transactions.end())
    fail("%s: no mbarrier was initialised at shared address %#x", what, address);
  return at->second;
}

void check_scope(Block* block, uint32_t address, bool cluster, const char* what) {
  if (find(block, address, what).cluster && !cluster)
    fail("%s at the scope of the block, where threads of other blocks arrive", what);
}

}  // namespace

void copy_async(uint32_t dst, const void* src, int bytes, int valid) {
  maybe_yield(8);
  if (valid < 0 || valid > bytes) fail("cp.async of %d valid bytes of %d", valid, bytes);
  const auto size = static_cast<size_t>(bytes);
  unsigned char* to = shared_pointer(self->block, dst, size, size, "cp.async");
  if (reinterpret_cast<uintptr_t>(src) % size != 0)
    fail("cp.async: source %p is not aligned to %d", src, bytes);
  if (valid > 0) check_read(src, "cp.async");
  std::memset(to, kPoison, size);
  self->copies.push_back({to, static_cast<const unsigned char*>(src), bytes, valid, self->copy_groups});
}

void copy_commit() {
  ++self->copy_groups;
}

void copy_wait(int left) {
  Thread* thread = self;
  for (size_t i = 0; i < thread->copies.size();) {
    if (thread->copies[i].group < thread->copy_groups - left) {
      run_copy(thread, i);
    } else {
      ++i;
    }
  }
  maybe_yield(8);
}

void run_copy(Thread* thread, size_t which) {
  const CopyOp op = thread->copies[which];
  thread->copies[which] = thread->copies.back();
  thread->copies.pop_back();
  deliver(op.dst, op.src, static_cast<size_t>(op.valid));
  std::memset(op.dst + op.valid, 0, static_cast<size_t>(op.bytes - op.valid));
}

void barrier_init(uint32_t address, int count) {
  shared_pointer(self->block, address, 8, 8, "mbarrier.init");
  if (count <= 0 || count >= 1 << 20) fail("mbarrier.init with a count of %d", count);
  TransactionBarrier barrier;
  barrier.count = barrier.pending = count;
  barrier.maker = self;
  self->block->transactions[address] = barrier;
}

void barrier_init_fence() {
  for (auto& entry : self->block->transactions) {
    TransactionBarrier& barrier = entry.second;
    if (barrier.maker == self && barrier.known == Known::kBlock) barrier.known = Known::kTma;
  }
}

TransactionBarrier& barrier_from_outside(Block* block, uint32_t address, const char* what) {
  auto at = block->transactions.find(address);
  if (at == block->transactions.end())
    fail("%s: block %u has no mbarrier at shared address %#x", what, block->cluster_rank, address);
  const bool remote = block != self->block;
  if (at->second.known == Known::kBlock)
    fail("%s: no mbarrier_init_fence behind the mbarrier's initialisation", what);
  if (remote && at->second.known != Known::kCluster)
    fail("%s: no cluster barrier behind mbarrier_init_fence", what);
  return at->second;
}

void barrier_arrive(uint32_t address, int64_t bytes) {
  maybe_yield(4);
  barrier_arrived(self->block, address, bytes);
}

void barrier_arrived(Block* block, uint32_t address, int64_t bytes) {
  TransactionBarrier& barrier = find(block, address, "mbarrier.arrive");
  barrier.bytes += bytes;
  if (--barrier.pending < 0) fail("mbarrier.arrive: more arrivals than the %d expected", barrier.count);
  maybe_flip(barrier);
}

void barrier_complete(Block* block, uint32_t address, int64_t bytes) {
  TransactionBarrier& barrier = find(block, address, "bulk copy");
  barrier.bytes -= bytes;
  maybe_flip(barrier);
}

void barrier_wait(uint32_t address, unsigned parity, bool cluster) {
  Block* block = self->block;
  // It stays where it is: no instruction here takes a barrier back.
  const TransactionBarrier* barrier = &find(block, address, "mbarrier.try_wait");
  spin(parity & 1 ? "mbarrier (parity 1)" : "mbarrier (parity 0)", [=] { return passed(*barrier, parity); });
  check_scope(block, address, cluster, "mbarrier.try_wait");
}

bool barrier_test(uint32_t address, unsigned parity, bool cluster) {
  maybe_yield();
  check_scope(self->block, address, cluster, "mbarrier.test_wait");
  return passed(find(self->block, address, "mbarrier.test_wait"), parity);
}

unsigned char* async_view(Block* block) {
  block->async_view.resize(block->shared_bytes, kPoison);
  return block->async_view.data();
}

void fence_async_proxy() {
  Block* block = self->block;
  std::memcpy(async_view(block), block->shared, block->shared_bytes);
}

}  // namespace sim
