// Shared-memory addresses, and stores that are seen late.
#include "sim/memory_model.h"

#include <cstring>

#include "sim/core.h"

namespace sim {
unsigned char* shared_pointer(Block* block, uint32_t address, size_t bytes, size_t alignment,
                              const char* what) {
  const uint64_t offset = static_cast<uint64_t>(address) - block->shared_base;
  if (address < block->shared_base || offset + bytes > block->shared_bytes) {
    fail("%s: %zu bytes at shared offset %lld, outside the block's %zu", what, bytes,
         static_cast<long long>(address) - static_cast<long long>(block->shared_base), block->shared_bytes);
  }
  if (address % alignment != 0)
    fail("%s: shared address %#x is not aligned to %zu", what, address, alignment);
  return block->shared + offset;
}

void deliver(void* dst, const void* src, size_t bytes) {
  Thread* const running = self;
  self = nullptr;
  std::memcpy(dst, src, bytes);
  self = running;
}

void drain(std::vector<LateStore>& stores) {
  for (const LateStore& store : stores) {
    if (store.block != nullptr && store.block->exited)
      fail("a store reaches block %u of the cluster, which has exited", store.block->cluster_rank);
    deliver(store.dst, store.value, static_cast<size_t>(store.bytes));
  }
  stores.clear();
}

void store_late(void* dst, const void* value, int bytes) {
  maybe_yield(8);
  check_store("a store");
  LateStore store{static_cast<unsigned char*>(dst), {}, bytes, nullptr};
  std::memcpy(store.value, value, static_cast<size_t>(bytes));
  self->stores.push_back(store);
}

void load_late(const void* src, void* value, int bytes) {
  maybe_yield(8);
  std::memcpy(value, src, static_cast<size_t>(bytes));
  // The newest first: a thread sees its own stores, and those from before a barrier that it has passed.
  for (const auto* stores : {&self->block->stores, &self->stores}) {
    for (const LateStore& store : *stores) {
      if (store.dst == src && store.bytes == bytes)
        std::memcpy(value, store.value, static_cast<size_t>(bytes));
    }
  }
}

void fence() {
  step_aside(2);
  drain(self->block->stores);
  drain(self->stores);
  maybe_yield();
}

void check_aligned(const void* p, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0)
    fail("%s: %p is not aligned to %zu", what, p, alignment);
}

}  // namespace sim
