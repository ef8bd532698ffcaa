// What the two warpgroups do that multiply: 64 rows of each tile, base product and low-rank term on the same
// accumulators.
#pragma once

#include "cuda/instructions/sync.h"
#include "cuda/instructions/wgmma.h"
#include "cuda/lora_linear/sm90_result.h"
#include "cuda/operand/dense_tma.h"

namespace peftkern::cuda::hopper {

// One warpgroup's place in the ring: products of one stage are in flight while the next is issued.
template <class T, int Columns, bool MakesV, bool ByRow>
struct Products {
  using Shared = Layout<Columns, MakesV>;
  const Shared& shared;
  uint32_t rows;  // bytes from a stage's first row to the warpgroup's
  int lane;
  Ring<Shared::kStages> ring{};
  uint32_t before = 0;  // the slot whose products are in flight
  bool in_flight = false;

  PEFTKERN_DEVICE void release() {
    if constexpr (kCluster<Columns> > 1) {
      // Stages of every block are filled by every block.
      if (in_flight && lane < kCluster<Columns>)
        mbarrier_arrive_unordered(shared.empty(before), static_cast<uint32_t>(lane));
    } else {
      if (in_flight && lane == 0) mbarrier_arrive(shared.empty(before));
    }
  }
  // Everything but the stage just issued is done.
  PEFTKERN_DEVICE void next() {
    wgmma_commit();
    wgmma_wait<1>();
    release();
    before = ring.slot;
    in_flight = true;
    ring.advance();
  }
  PEFTKERN_DEVICE void finish() {
    wgmma_wait<0>();
    release();
    in_flight = false;
  }

  // The base product. fresh: the accumulators hold nothing yet.
  PEFTKERN_DEVICE void base(float (&sums)[Columns / 2], int steps, bool fresh) {
    for (int step = 0; step < steps; ++step) {
      mbarrier_wait(shared.full(ring.slot), ring.parity);
      const uint64_t left = wgmma_descriptor(shared.left(ring.slot) + rows, 1024);
      DenseTiles<Columns, ByRow>::template multiply<T>(sums, left, shared.right(ring.slot),
                                                       fresh && step == 0);
      next();
    }
  }

  // Groups of 16 ranks in each stage, and terms of lora_B: v1 b0 + v0 b0, with two v0 b1 before. Compile-time
  // numbers, or the compiler would not let the products of a stage run as one group.
  template <int Terms, int Groups>
  PEFTKERN_DEVICE void low_rank(float (&sums)[Columns / 2], int steps, bool fresh) {
    for (int step = 0; step < steps; ++step) {
      mbarrier_wait(shared.full(ring.slot), ring.parity);
      const uint64_t left = wgmma_descriptor(shared.left(ring.slot) + rows, 1024);
      const uint64_t right = wgmma_descriptor(shared.right(ring.slot), 1024);
      wgmma_fence();
#pragma unroll
      for (int group = 0; group < Groups; ++group) {
        // A term takes 32 bytes of a row.
        const uint64_t v = left + 4 * group, b = right + 4 * group;
        const bool accumulate = !(fresh && step == 0 && group == 0);
        if constexpr (Terms == 2) wgmma<bf16, Columns>(sums, v, b + 2, accumulate);
        wgmma<bf16, Columns>(sums, v + 2, b, Terms == 2 || accumulate);
        wgmma<bf16, Columns>(sums, v, b, true);
      }
      next();
    }
  }
  template <int Terms>
  PEFTKERN_DEVICE void low_rank(float (&sums)[Columns / 2], const Walk<Columns, MakesV>& walk, bool fresh) {
    const int whole = walk.rank_steps - (walk.rank_tail ? 1 : 0);
    low_rank<Terms, 2>(sums, whole, fresh);
    if (walk.rank_tail) low_rank<Terms, 1>(sums, 1, fresh && whole == 0);
  }
  PEFTKERN_DEVICE void low_rank(float (&sums)[Columns / 2], const Walk<Columns, MakesV>& walk, bool one_term,
                                bool fresh) {
    if (one_term) {
      low_rank<1>(sums, walk, fresh);
    } else {
      low_rank<2>(sums, walk, fresh);
    }
  }
};

// The 128 threads of multiplying warpgroup `group` meet.
PEFTKERN_DEVICE void meet(int group) {
  if (group == 0) {
    barrier_sync<kAdapterBarrier + 1>(128);
  } else {
    barrier_sync<kAdapterBarrier + 2>(128);
  }
}

template <class T, int Columns, bool MakesV, bool ByRow>
PEFTKERN_DEVICE void multiply(const LoraLinearArgs& args, const Layout<Columns, MakesV>& shared, int group) {
  const int t = static_cast<int>(threadIdx.x) % 128;
  const Walk<Columns, MakesV> walk(args);
  const int lane = t % 32, warp = t / 32;
  const bool single = one_term(args), has_vectors = args.scales.g_b != nullptr || args.bias != nullptr;
  auto* const scale = reinterpret_cast<float*>(shared.memory + shared.kVectorsAt) + group * 2 * Columns;
  float* const bias = scale + Columns;
  Products<T, Columns, MakesV, ByRow> products{shared, static_cast<uint32_t>(group) * 64 * 128, lane};
  float sums[Columns / 2];
  for (int index = walk.first; index < walk.tiles; index += walk.step) {
    const Tile tile = walk.at(index);
    // Read now, needed after the product.
    float my_scale[Columns / 128], my_bias[Columns / 128];
    if (has_vectors) {
#pragma unroll
      for (int i = 0; i < Columns / 128; ++i) {
        const int column = tile.column + i * 128 + t;
        my_scale[i] = args.scales.g_b != nullptr && column < args.N ? args.scales.g_b[column] : 0.0f;
        my_bias[i] = args.bias != nullptr && column < args.N ? load_bias<T>(args, column) : 0.0f;
      }
    }
    if (!MakesV && walk.rank_first) {
      products.low_rank(sums, walk, single, true);
      products.finish();
      const unsigned char* mask = shared.memory + shared.kExtraAt + (group * 64 + warp * 16) * (Columns / 8);
      apply_mask<Columns>(sums, mask, lane);
      sync_warp();
      if (lane == 0) mbarrier_arrive(shared.mask_read());
    }
    products.base(sums, walk.steps, !walk.rank_first);
    if (has_vectors) {
      // Those of the tile before have been read.
      meet(group);
#pragma unroll
      for (int i = 0; i < Columns / 128; ++i) {
        scale[i * 128 + t] = my_scale[i];
        bias[i * 128 + t] = my_bias[i];
      }
      meet(group);
    }
    if (args.scales.g_b != nullptr) {
      products.finish();
      multiply_columns<Columns>(sums, scale, lane);
    }
    if (MakesV || !walk.rank_first) products.low_rank(sums, walk, single, false);
    products.finish();
    if (args.bias != nullptr) add_columns<Columns>(sums, bias, lane);
    store_sums<T, Columns>(args, sums, int64_t{tile.row} + group * 64 + warp * 16, tile.column, lane);
  }
}

}  // namespace peftkern::cuda::hopper
