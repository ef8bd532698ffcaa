// Lanes and threads that meet: warp collectives and the barriers of a block.
#include "sim/barrier.h"

#include <cstring>

#include "sim/core.h"

namespace sim {

void meet(const char* kind, uint32_t members, void* operands, void (*compute)(void* const*, uint32_t)) {
  Thread* thread = self;
  Warp* warp = thread->warp;
  const uint32_t bit = 1u << thread->lane;
  if ((members & bit) == 0) fail("%s: mask %08x lacks the calling lane", kind, members);
  if ((members & ~warp->present) != 0) fail("%s: mask %08x names lanes that do not exist", kind, members);
  size_t at = 0;
  for (; at < warp->meetings.size(); ++at) {
    const Meeting& other = warp->meetings[at];
    if ((other.members & members) == 0) continue;
    if (std::strcmp(other.kind, kind) != 0 || other.members != members) {
      fail("%s (mask %08x) while other lanes are in %s (mask %08x): the warp has diverged", kind, members,
           other.kind, other.members);
    }
    break;
  }
  if (at == warp->meetings.size()) warp->meetings.push_back({kind, members, 0, {}});
  Meeting& meeting = warp->meetings[at];
  meeting.arrived |= bit;
  meeting.operands[thread->lane] = operands;
  if (meeting.arrived != members) {
    for (uint32_t rest = members & ~meeting.arrived; rest != 0; rest &= rest - 1) {
      if (warp->lanes[__builtin_ctz(rest)].done)
        fail("%s (mask %08x) waits for a lane that has exited", kind, members);
    }
    block(kind);
    return;
  }
  const Meeting full = meeting;
  warp->meetings.erase(warp->meetings.begin() + static_cast<long>(at));
  if (compute != nullptr) compute(full.operands, members);
  for (uint32_t rest = members & ~bit; rest != 0; rest &= rest - 1) wake(&warp->lanes[__builtin_ctz(rest)]);
  maybe_yield();
}

void barrier(int id, int threads, bool waits) {
  Thread* thread = self;
  Block* block_ = thread->block;
  if (id < 0 || id > 15) fail("barrier %d", id);
  if (threads <= 0 || threads % 32 != 0) {
    const bool whole =
        id == 0 && threads == static_cast<int>(block_->size.x * block_->size.y * block_->size.z);
    if (!whole) fail("barrier %d for %d threads, not a multiple of a warp", id, threads);
  }
  maybe_yield(4);
  NamedBarrier& barrier = block_->barriers[id];
  if (barrier.arrived == 0) barrier.expected = threads;
  if (barrier.expected != threads)
    fail("barrier %d for %d threads, of which others wait for %d", id, threads, barrier.expected);
  // What a thread stored before a barrier, a fence by any thread after it publishes.
  for (const LateStore& store : thread->stores) block_->stores.push_back(store);
  thread->stores.clear();
  if (++barrier.arrived < barrier.expected) {
    if (!waits) return;
    barrier.waiting.push_back(thread);
    block(id == 0 ? "barrier 0" : "a named barrier");
    return;
  }
  for (Thread* other : barrier.waiting) wake(other);
  barrier.waiting.clear();
  barrier.arrived = 0;
  maybe_yield();
}

}  // namespace sim
