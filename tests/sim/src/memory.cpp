// Memory that tests hand to kernels, shared-memory addresses, stores that are seen late.
#include "sim/memory_model.h"

#include <sys/mman.h>

#include <cstring>

#include "sim/core.h"

namespace sim {
namespace {

constexpr size_t kPage = 4096;
thread_local std::map<void*, std::pair<void*, size_t>> allocations;  // what the test sees -> the mapping

}  // namespace

void* allocate(size_t bytes, size_t alignment, bool at_end) {
  const size_t pages = (bytes + kPage - 1) / kPage * kPage;
  auto* base = static_cast<unsigned char*>(
      mmap(nullptr, pages + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (base == MAP_FAILED) return nullptr;
  std::memset(base + kPage, kPoison, pages);
  mprotect(base, kPage, PROT_NONE);
  mprotect(base + kPage + pages, kPage, PROT_NONE);
  const size_t slack = at_end ? (pages - bytes) / alignment * alignment : 0;
  void* p = base + kPage + slack;
  allocations[p] = {base, pages + 2 * kPage};
  return p;
}

bool release(void* p, size_t bytes) {
  auto [base, length] = allocations.at(p);
  allocations.erase(p);
  const auto* first = static_cast<unsigned char*>(base) + kPage;
  const auto* last = first + length - 2 * kPage;
  const auto* begin = static_cast<unsigned char*>(p);
  bool intact = true;
  for (const auto* q = first; q < last; ++q) {
    if (q < begin || q >= begin + bytes) intact = intact && *q == kPoison;
  }
  munmap(base, length);
  return intact;
}

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

void drain(std::vector<LateStore>& stores) {
  for (const LateStore& store : stores) {
    if (store.block != nullptr && store.block->exited)
      fail("a store reaches block %u of the cluster, which has exited", store.block->cluster_rank);
    std::memcpy(store.dst, store.value, static_cast<size_t>(store.bytes));
  }
  stores.clear();
}

void store_late(void* dst, const void* value, int bytes) {
  maybe_yield(8);
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
