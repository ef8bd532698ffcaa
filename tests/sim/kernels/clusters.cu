// What blocks of a cluster do for each other. With a `bug` other than 0 a kernel has that bug.
#include "cuda/instructions/cluster.h"
#include "cuda/instructions/launch.h"
#include "cuda/instructions/mbarrier.h"
#include "cuda/instructions/sync.h"
#include "cuda/instructions/tma.h"
#include "cuda/instructions/warp.h"
#include "export.h"

namespace peftkern::cuda {
namespace {

enum ExchangeBug {
  kExchangeCorrect,
  kNoBarrierBeforeReading,
  kNoBarrierBeforeExit,
  kNoBarrierAfterStoring,
  kOnlyArrives,
  kAddressOfThisBlock,
};

constexpr unsigned kExchangeThreads = 64;

struct alignas(8) Pair {
  uint32_t word[2];
};

// Every block of a cluster of `size` makes 64 values of 16 bytes, reads those of all blocks in 4, 8 and 16
// bytes and stores a word, a pair and 16 bytes into the next block. out (blocks, 64, 4 * size + 7): a
// thread's row.
__global__ void exchange_kernel(unsigned size, uint32_t* out, int bug) {
  auto* mine = reinterpret_cast<uint32_t*>(shared_memory());
  auto* box = mine + 4 * kExchangeThreads;
  const unsigned t = threadIdx.x, rank = cluster_rank(), next = (rank + 1) % size;
  out += (blockIdx.x * kExchangeThreads + t) * (4 * size + 7);
  for (unsigned i = 0; i < 4; ++i) mine[4 * t + i] = 1000 * blockIdx.x + 4 * t + i;
  if (bug != kNoBarrierBeforeReading) {
    cluster_arrive();
    if (bug != kOnlyArrives) cluster_wait();
  }
  const unsigned other = kExchangeThreads - 1 - t;
  for (unsigned r = 0; r < size; ++r) {
    uint32_t there = shared_address(mine + 4 * other);
    if (bug != kAddressOfThisBlock) there = cluster_address(there, (rank + r) % size);
    if (r % 3 == 0) {
      const Vec16 v = cluster_load<Vec16>(there);
      for (int i = 0; i < 4; ++i) out[4 * r + i] = v.word[i];
    } else if (r % 3 == 1) {
      for (uint32_t i = 0; i < 4; i += 2) {
        const Pair v = cluster_load<Pair>(there + 4 * i);
        for (uint32_t j = 0; j < 2; ++j) out[4 * r + i + j] = v.word[j];
      }
    } else {
      for (uint32_t i = 0; i < 4; ++i) out[4 * r + i] = cluster_load<uint32_t>(there + 4 * i);
    }
  }
  const uint32_t to = cluster_address(shared_address(box), next), value = 7 * blockIdx.x + t;
  cluster_store(to + 16 * t, Vec16{{value, value + 1, value + 2, value + 3}});
  cluster_store(to + 16 * kExchangeThreads + 8 * t, Pair{{value + 4, value + 5}});
  cluster_store(to + 24 * kExchangeThreads + 4 * t, value + 6);
  if (bug == kOnlyArrives) cluster_wait();
  if (bug != kNoBarrierAfterStoring) cluster_sync();
  const unsigned last = 4 * size;
  for (unsigned i = 0; i < 4; ++i) out[last + i] = box[4 * t + i];
  for (unsigned i = 0; i < 2; ++i) out[last + 4 + i] = box[4 * kExchangeThreads + 2 * t + i];
  out[last + 6] = box[6 * kExchangeThreads + t];
  // Somebody reads this block once more.
  const uint32_t again = cluster_load<uint32_t>(cluster_address(shared_address(mine + 4 * t), next));
  if (again != out[0] + 1000 * (next - rank) + 4 * (t - other)) out[0] = 0;
  if (bug != kNoBarrierBeforeExit) cluster_sync();
}

enum PushBug {
  kPushCorrect,
  kPushTooFewBytes,
  kPushTooManyBytes,
  kPushNoWait,
  kPushNoClusterBarrier,
  kPushBarrierOfThisBlock,
  kPushNoInitFence,
  kPushInitFenceBeforeInit,
  kPushInitFenceBehindArrival,
};

// Every thread sends 16, 8 and 4 bytes to each block of the cluster, all of which wait for the bytes alone.
// out (blocks, size, 64, 7): what came from each block.
__global__ void push_kernel(unsigned size, uint32_t* out, int bug) {
  const unsigned t = threadIdx.x, rank = cluster_rank(), slot = 7 * kExchangeThreads;
  auto* inbox = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t barrier = shared_address(inbox + size * slot);
  if (t == 0) {
    if (bug == kPushInitFenceBeforeInit) mbarrier_init_fence();
    mbarrier_init(barrier, 1);
    if (bug < kPushNoInitFence) mbarrier_init_fence();
    const uint32_t bytes = 4 * size * slot;
    mbarrier_arrive_expect(barrier, bug == kPushTooFewBytes    ? bytes - 28
                                    : bug == kPushTooManyBytes ? bytes + 4
                                                               : bytes);
  }
  cluster_arrive_relaxed();
  if (bug == kPushInitFenceBehindArrival && t == 0) mbarrier_init_fence();
  if (bug != kPushNoClusterBarrier) cluster_wait();
  const uint32_t value = 10000 * blockIdx.x + 10 * t;
  for (uint32_t r = 0; r < size; ++r) {
    const uint32_t to = cluster_address(shared_address(inbox + rank * slot), r),
                   there = cluster_address(barrier, bug == kPushBarrierOfThisBlock ? rank : r);
    cluster_store_async(to + 16 * t, Vec16{{value, value + 1, value + 2, value + 3}}, there);
    cluster_store_async(to + 16 * kExchangeThreads + 8 * t, Pair{{value + 4, value + 5}}, there);
    cluster_store_async(to + 24 * kExchangeThreads + 4 * t, value + 6, there);
  }
  if (bug != kPushNoWait) mbarrier_wait_cluster(barrier, 0);
  out += blockIdx.x * size * slot + 7 * t;
  for (unsigned r = 0; r < size; ++r, out += slot, inbox += slot) {
    for (unsigned i = 0; i < 4; ++i) out[i] = inbox[4 * t + i];
    for (unsigned i = 0; i < 2; ++i) out[4 + i] = inbox[4 * kExchangeThreads + 2 * t + i];
    out[6] = inbox[6 * kExchangeThreads + t];
  }
}

enum MulticastBug {
  kMulticastCorrect,
  kMaskOfThisBlock,
  kMaskOfOtherBlock,
  kBytesOfThisBlock,
  kBytesTooMany,
  kNoRemoteArrival,
  kArrivalsOfThisBlockOnly,
  kNoWaitForEmpty,
  kNoClusterBarrierAfterInit,
  kNoClusterBarrierAtEnd,
  kScopeOfBlock,
  kMulticastNoInitFence,
};

constexpr int kRows = 16, kColumns = 64, kStages = 2, kConsumers = 2, kThreads = 32 * (kConsumers + 1);
constexpr uint32_t kTileBytes = kRows * kColumns * 2, kSize = 2;

// Sums over `steps` tiles of 16 x 64, each of whose halves one block of a cluster of two loads for both.
// out (blocks, 64): block b adds up columns, each tile times b + 1.
__global__ void __launch_bounds__(kThreads)
    multicast_kernel(const __grid_constant__ TensorMap map, int steps, uint32_t* out, int bug) {
  unsigned char* const raw = shared_memory();
  const uint32_t up = (128 - shared_address(raw) % 128) % 128, stages = shared_address(raw) + up,
                 full = stages + kStages * kTileBytes, empty = full + 8 * kStages;
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32;
  const uint32_t rank = cluster_rank(), arrivals = bug == kArrivalsOfThisBlockOnly ? 1 : kSize;
  if (t == 0) {
    for (uint32_t s = 0; s < kStages; ++s) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, static_cast<int>(kConsumers * arrivals));
    }
    if (bug != kMulticastNoInitFence) mbarrier_init_fence();
  }
  if (bug == kNoClusterBarrierAfterInit) {
    sync_threads();
  } else {
    cluster_sync();
  }
  if (warp == kConsumers) {
    for (int step = 0; step < steps && lane == 0; ++step) {
      const auto s = static_cast<uint32_t>(step % kStages),
                 parity = static_cast<uint32_t>(step / kStages % 2);
      if (bug == kScopeOfBlock) {
        mbarrier_wait(empty + 8 * s, parity ^ 1);
      } else if (bug != kNoWaitForEmpty) {
        mbarrier_wait_cluster(empty + 8 * s, parity ^ 1);
      }
      const uint32_t bytes = bug == kBytesOfThisBlock ? kTileBytes / 2
                             : bug == kBytesTooMany   ? kTileBytes + 128
                                                      : kTileBytes;
      mbarrier_arrive_expect(full + 8 * s, bytes);
      const uint32_t mask = bug == kMaskOfThisBlock    ? 1u << rank
                            : bug == kMaskOfOtherBlock ? 2u >> rank
                                                       : (1u << kSize) - 1;
      tile_load_multicast(stages + s * kTileBytes + rank * (kTileBytes / 2), &map, full + 8 * s,
                          step * kRows + static_cast<int>(rank) * kRows / 2, 0, static_cast<uint16_t>(mask));
    }
    sync_warp();
  } else {
    uint32_t sum = 0;
    for (int step = 0; step < steps; ++step) {
      const auto s = static_cast<uint32_t>(step % kStages),
                 parity = static_cast<uint32_t>(step / kStages % 2);
      mbarrier_wait(full + 8 * s, parity);
      const auto* tile = reinterpret_cast<const uint16_t*>(raw + up + s * kTileBytes);
      for (int row = 0; row < kRows; ++row) sum += (rank + 1) * tile[row * kColumns + t];
      sync_warp();
      if (lane < static_cast<int>(kSize)) {
        const auto to = static_cast<uint32_t>(lane);
        const bool local = bug == kNoRemoteArrival || bug == kArrivalsOfThisBlockOnly;
        if (!local || to == rank) mbarrier_arrive_cluster(empty + 8 * s, to);
      }
    }
    out[blockIdx.x * kColumns + static_cast<unsigned>(t)] = sum;
  }
  if (bug != kNoClusterBarrierAtEnd) cluster_sync();
}

enum HandoverBug { kHandoverCorrect, kUnordered, kHandoverNoInitFence };

// Two blocks hand each other a word per thread. First they meet without handing anything over.
__global__ void handover_kernel(uint32_t* out, int bug) {
  auto* box = reinterpret_cast<uint32_t*>(shared_memory());
  const unsigned t = threadIdx.x, other = 1 - cluster_rank();
  const uint32_t met = shared_address(box + 32), filled = met + 8;
  if (t == 0) {
    mbarrier_init(met, 32);
    mbarrier_init(filled, 32);
    if (bug != kHandoverNoInitFence) mbarrier_init_fence();
  }
  cluster_sync();
  mbarrier_arrive_unordered(met, other);
  mbarrier_wait(met, 0);
  cluster_store(cluster_address(shared_address(box + t), other), 100 * blockIdx.x + t);
  if (bug == kUnordered) {
    mbarrier_arrive_unordered(filled, other);
    mbarrier_wait(filled, 0);
  } else {
    mbarrier_arrive_cluster(filled, other);
    mbarrier_wait_cluster(filled, 0);
  }
  out[blockIdx.x * 32 + t] = box[t];
  cluster_sync();
}

}  // namespace
}  // namespace peftkern::cuda

using namespace peftkern::cuda;

PEFTKERN_EXPORT const char* sim_exchange(unsigned size, unsigned clusters, uint32_t* out, int bug) {
  Launch how{{clusters * size}, {kExchangeThreads}, 44 * kExchangeThreads};
  how.cluster = size;
  return launch(how, exchange_kernel, size, out, bug);
}

PEFTKERN_EXPORT const char* sim_push(unsigned size, unsigned clusters, uint32_t* out, int bug) {
  Launch how{{clusters * size}, {kExchangeThreads}, 28 * kExchangeThreads * size + 8};
  how.cluster = size;
  return launch(how, push_kernel, size, out, bug);
}

PEFTKERN_EXPORT const char* sim_multicast(uint16_t* data, int steps, unsigned clusters, uint32_t* out,
                                          int bug) {
  TensorMap map;
  const TensorMapShape shape{data,     false, int64_t{steps} * kRows, kColumns, kColumns, kRows / 2,
                             kColumns, false};
  const char* error = encode_tensor_map(shape, &map);
  if (error != nullptr) return error;
  Launch how{{clusters * kSize}, {kThreads}, 128 + kStages * (kTileBytes + 16)};
  how.cluster = kSize;
  return launch(how, multicast_kernel, map, steps, out, bug);
}

PEFTKERN_EXPORT const char* sim_cluster_handover(unsigned clusters, uint32_t* out, int bug) {
  Launch how{{clusters * 2}, {32}, 32 * 4 + 16};
  how.cluster = 2;
  return launch(how, handover_kernel, out, bug);
}
