// Starting and ending blocks.
#include "grid.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "fiber.h"

namespace sim {
namespace {

constexpr size_t kPage = 4096, kStack = 128 * 1024, kMaxShared = 227 * 1024;
constexpr size_t kShared = 256 * 1024;  // of address space per block, a guard page at either end
constexpr size_t kMargin = 1024;        // watched bytes on either side, beside the guard page

unsigned char* map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fail("no memory for a block");
  return static_cast<unsigned char*>(p);
}

unsigned threads_of(const LaunchShape& s) {
  return s.block.x * s.block.y * s.block.z;
}

}  // namespace

Grid::Grid(const LaunchShape& s, unsigned n, unsigned last) : shape(s), slots(std::max(n, s.cluster)) {
  const unsigned clusters = s.cluster == 0 ? 0 : s.grid.x * s.grid.y * s.grid.z / s.cluster;
  for (unsigned i = last == 0 || last > clusters ? 0 : clusters - last; i < clusters; ++i)
    waiting_.push_back(i * s.cluster);
}

Grid::~Grid() {
  for (unsigned char* p : used_memory_) munmap(p, kShared);
  for (unsigned char* p : used_stacks_) munmap(p, kStack * threads_of(shape));
}

void Grid::check() const {
  const unsigned threads = threads_of(shape), blocks = shape.grid.x * shape.grid.y * shape.grid.z;
  if (threads == 0 || threads > 1024) fail("%u threads in a block", threads);
  if (blocks == 0 || shape.grid.y > 65535 || shape.grid.z > 65535)
    fail("a grid without blocks, or y or z too large");
  if (shape.shared > kMaxShared) fail("%zu bytes of shared memory", shape.shared);
  if (shape.cluster > 8) fail("a cluster of %u blocks", shape.cluster);
  if (shape.cluster == 0 || shape.grid.x % shape.cluster != 0) fail("clusters do not divide the grid");
}

void Grid::refill() {
  while (!waiting_.empty() && resident.size() + shape.cluster <= slots) {
    const size_t i = random_bits() % waiting_.size();
    const unsigned first = waiting_[i];
    waiting_[i] = waiting_.back();
    waiting_.pop_back();
    auto cluster = std::make_shared<Cluster>();
    cluster->size = shape.cluster;
    cluster->alive = cluster->missing = shape.cluster * threads_of(shape);
    // Shared memory is flush with the guard page, or a little before it: then the base is aligned to 16 bytes
    // and no more. Addresses are the same in all blocks of a cluster.
    skew_ = chance(2) ? 0 : 16 * (1 + random_bits() % 60);
    for (unsigned rank = 0; rank < shape.cluster; ++rank) start(first + rank, cluster, rank);
  }
}

void Grid::start(unsigned linear, std::shared_ptr<Cluster> cluster, unsigned rank) {
  const unsigned threads = threads_of(shape);
  auto block = std::make_unique<Block>();
  block->index =
      Dim(linear % shape.grid.x, linear / shape.grid.x % shape.grid.y, linear / shape.grid.x / shape.grid.y);
  block->size = shape.block;
  block->grid = shape.grid;
  block->cluster = cluster;
  block->cluster_rank = rank;
  cluster->blocks.push_back(block.get());
  if (free_memory_.empty()) {
    free_memory_.push_back(map_pages(kShared));
    free_stacks_.push_back(map_pages(kStack * threads));
    used_memory_.push_back(free_memory_.back());
    used_stacks_.push_back(free_stacks_.back());
    mprotect(free_memory_.back(), kPage, PROT_NONE);
    mprotect(free_memory_.back() + kShared - kPage, kPage, PROT_NONE);
    for (unsigned t = 0; t < threads; ++t) mprotect(free_stacks_.back() + t * kStack, kPage, PROT_NONE);
  }
  unsigned char* memory = free_memory_.back();
  unsigned char* stacks = free_stacks_.back();
  free_memory_.pop_back();
  free_stacks_.pop_back();
  of_block_[block.get()] = {memory, stacks};
  const size_t space = (shape.shared + 15) / 16 * 16;
  block->shared = memory + kShared - kPage - space - skew_;
  block->shared_bytes = shape.shared;
  std::memset(block->shared - kMargin, kPoison, kMargin + space + skew_);
  block->shared_base = 0x400 + static_cast<uint32_t>(block->shared - memory);

  block->alive = static_cast<int>(threads);
  for (unsigned t = 0; t < threads; ++t) {
    if (t % 32 == 0) {
      block->warps.push_back(std::make_unique<Warp>());
      block->warps.back()->priority = static_cast<double>(random_bits());
    }
    Warp* warp = block->warps.back().get();
    Thread& thread = warp->lanes[t % 32];
    thread.index =
        Dim(t % shape.block.x, t / shape.block.x % shape.block.y, t / shape.block.x / shape.block.y);
    thread.lane = static_cast<int>(t % 32);
    thread.warp = warp;
    thread.block = block.get();
    thread.context = make_fiber(stacks + t * kStack + kPage, kStack - kPage, entry);
    warp->present |= 1u << (t % 32);
    warp->runnable = warp->present;
  }
  resident.push_back(std::move(block));
}

void Grid::retire(Block* block) {
  const auto [memory, stacks] = of_block_[block];
  const unsigned x = block->index.x, y = block->index.y;
  for (auto& warp : block->warps) {
    if (!warp->products.empty()) fail("block %u,%u ends with wgmma in flight", x, y);
    if (!warp->meetings.empty())
      fail("block %u,%u ends with lanes missing from %s", x, y, warp->meetings[0].kind);
  }
  for (const BulkOp& op : bulk) {
    if (op.block == block) fail("block %u,%u ends with %s in flight", x, y, op.what);
  }
  for (int i = 0; i < 16; ++i) {
    if (block->barriers[i].arrived != 0) fail("block %u,%u ends with barrier %d half full", x, y, i);
  }
  const unsigned char* const end = memory + kShared - kPage;
  for (const unsigned char* p = block->shared - kMargin; p < end; ++p) {
    const bool inside = p >= block->shared && p < block->shared + block->shared_bytes;
    if (inside) p = block->shared + block->shared_bytes;
    if (p < end && *p != kPoison)
      fail("block %u,%u wrote %td bytes past its shared memory", x, y, p - block->shared);
  }
  drain(block->stores);
  block->exited = true;
  // Until the last one of the cluster ends, what the others do to this block is looked at.
  const std::shared_ptr<Cluster> cluster = block->cluster;
  if (++cluster->exited < cluster->size) return;
  for (Block* member : cluster->blocks) forget(member);
}

void Grid::forget(Block* block) {
  const auto [memory, stacks] = of_block_[block];
  free_memory_.push_back(memory);
  free_stacks_.push_back(stacks);
  of_block_.erase(block);
  auto at = std::find_if(resident.begin(), resident.end(), [&](auto& b) { return b.get() == block; });
  resident.erase(at);
}

}  // namespace sim
