// Blocks that depend on each other: every block stores a part, the last to arrive adds the parts up; and, as
// another kernel, consumers that wait for producers by ticket. With a `bug` other than 0 they have that bug.
#include "cuda/instructions/launch.h"
#include "cuda/instructions/memory.h"
#include "cuda/instructions/sync.h"
#include "export.h"

namespace peftkern::cuda {
namespace {

enum Bug { kNone, kNoFence, kNoBarrierBeforeCounting, kNoResetOfCounter, kFenceBeforeStores, kNoTicket };

constexpr int kThreads = 64;

// parts (blocks, 64), out (64): the sums over blocks of in (blocks, 64).
__global__ void last_arriver_kernel(const float* in, float* parts, uint32_t* counter, float* out, int bug) {
  auto* last = reinterpret_cast<uint32_t*>(shared_memory());
  const unsigned t = threadIdx.x, blocks = gridDim.x;
  if (bug == kFenceBeforeStores && t == 0) fence_device();
  store_published(parts + blockIdx.x * kThreads + t, in[blockIdx.x * kThreads + t]);
  if (bug != kNoBarrierBeforeCounting) sync_threads();
  if (t == 0) {
    if (bug != kNoFence && bug != kFenceBeforeStores) fence_device();
    *last = bug == kNoResetOfCounter ? atomic_add(counter, 1) : atomic_count(counter, blocks);
    fence_device();
  }
  sync_threads();
  if (*last != blocks - 1) return;
  float sum = 0;
  for (unsigned i = 0; i < blocks; ++i) sum += load_published(parts + i * kThreads + t);
  out[t] = sum;
}

// The first `producers` tickets make parts, the others wait for all of them and each writes its own copy of
// the sum. counters: tickets, parts made.
__global__ void ticket_kernel(const float* in, unsigned producers, float* parts, uint32_t* counters,
                              float* out, int bug) {
  auto* ticket = reinterpret_cast<uint32_t*>(shared_memory());
  const unsigned t = threadIdx.x;
  if (t == 0) *ticket = bug == kNoTicket ? gridDim.x - 1 - blockIdx.x : atomic_add(&counters[0], 1);
  sync_threads();
  const unsigned mine = *ticket;
  if (mine < producers) {
    store_published(parts + mine * kThreads + t, in[mine * kThreads + t]);
    sync_threads();
    if (t == 0) {
      if (bug != kNoFence) fence_device();
      atomic_add(&counters[1], 1);
    }
    return;
  }
  if (t == 0) wait_at_least(&counters[1], producers);
  sync_threads();
  float sum = 0;
  for (unsigned i = 0; i < producers; ++i) sum += load_published(parts + i * kThreads + t);
  out[(mine - producers) * kThreads + t] = sum;
}

}  // namespace
}  // namespace peftkern::cuda

using namespace peftkern::cuda;

// Twice: the counter must be ready for the next launch.
PEFTKERN_EXPORT const char* sim_last_arriver(const float* in, unsigned blocks, float* parts,
                                             uint32_t* counter, float* out, int bug) {
  const Launch how{{blocks}, {kThreads}, 16};
  const char* error = launch(how, last_arriver_kernel, in, parts, counter, out, bug);
  if (error != nullptr) return error;
  return launch(how, last_arriver_kernel, in, parts, counter, out + kThreads, bug);
}

PEFTKERN_EXPORT const char* sim_tickets(const float* in, unsigned producers, unsigned consumers, float* parts,
                                        uint32_t* counters, float* out, int bug) {
  return launch({{producers + consumers}, {kThreads}, 16}, ticket_kernel, in, producers, parts, counters, out,
                bug);
}
