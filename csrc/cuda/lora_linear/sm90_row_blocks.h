// Who makes which rows of v, and when they may be read.
#pragma once

#include "cuda/lora_linear/sm90_shrink.h"

namespace peftkern::cuda::hopper {

// Blocks of rows of v. A block of the grid waits for rows only when their ticket is taken, so by a block that
// runs and, until they are done, waits for nobody: all waits end, however few blocks run at the same time.
//
// counters: tickets taken, blocks of the grid that are done, then, of each block of rows, whether it is done.
template <class T>
struct RowBlocks {
  static constexpr int kNone = -1;
  const LoraLinearArgs& args;
  unsigned char* terms;
  int* ticket;  // in shared memory
  int t;

  PEFTKERN_DEVICE uint32_t* done(int block) const { return args.counters + 2 + block; }
  PEFTKERN_DEVICE int count() const { return (static_cast<int>(args.M) + kRowBlock - 1) / kRowBlock; }

  // The same in all three warps.
  PEFTKERN_DEVICE int broadcast(int value) const {
    if (t == 0) *ticket = value;
    barrier_sync<kAdapterBarrier>(kAdapterThreads);
    const int got = *ticket;
    barrier_sync<kAdapterBarrier>(kAdapterThreads);
    return got;
  }

  PEFTKERN_DEVICE void make(int block) const {
    const int here = known_here(t);
    if (args.R <= 16) {
      Shrink<T, 1>(args, terms, here, block * kRowBlock).run();
    } else {
      Shrink<T, 2>(args, terms, here, block * kRowBlock).run();
    }
    barrier_sync<kAdapterBarrier>(kAdapterThreads);
    if (t == 0) {
      fence_device();
      atomic_add(done(block), 1);
    }
  }
  // The rows of v that a tile wants, made by whomever; here are made those that nobody has taken yet, and,
  // with `first`, some in any case.
  PEFTKERN_DEVICE void wait_for(const Tile& tile, bool first) const {
    // A tile below the matrix wants none.
    const int M = static_cast<int>(args.M), end = tile.row + kRows < M ? tile.row + kRows : M;
    const int low = tile.row / kRowBlock, high = tile.row < M ? (end - 1) / kRowBlock : -1;
    while (true) {
      int taken = kNone;
      if (t == 0 && (first || static_cast<int>(load_published(args.counters)) <= high))
        taken = static_cast<int>(atomic_add(args.counters, 1));
      first = false;
      taken = broadcast(taken);
      if (taken == kNone) break;
      if (taken < count()) make(taken);
    }
    if (low + t <= high) wait_at_least(done(low + t), 1);
    barrier_sync<kAdapterBarrier>(kAdapterThreads);
  }
  // The last block makes the counters ready for the next launch: nobody waits any more.
  PEFTKERN_DEVICE void leave() const {
    const bool last = broadcast(t == 0 ? static_cast<int>(atomic_count(args.counters + 1, gridDim.x)) : 0) ==
                      static_cast<int>(gridDim.x) - 1;
    if (!last) return;
    if (t == 0) *args.counters = 0;
    for (int i = t; i < count(); i += kAdapterThreads) *done(i) = 0;
  }
};

}  // namespace peftkern::cuda::hopper
