// The loader of a dense W for lora_linear_sm90: tiles of kDepth of k by Columns of the output by TMA, shared
// among the blocks of a cluster, in the layout that wgmma reads. W lies by column (rows of memory are columns
// of the output) or by row (they are those of k); the product above does not know which.
#pragma once

#include "cuda/instructions/tma.h"
#include "cuda/instructions/wgmma.h"
#include "cuda/lora_linear/sm90_plan.h"

namespace peftkern::cuda::hopper {

template <int Columns, bool ByRow>
struct DenseTiles {
  static constexpr int kShare = Columns / kCluster<Columns>;  // columns of a tile that one block loads

  // On the host: W (N, K) for `load`.
  static TensorMapShape shape(const ConstMatrix& w, int64_t N, int64_t K) {
    void* const data = const_cast<void*>(w.data);
    const bool is_f16 = w.dtype == DType::f16;
    if (ByRow) return {data, is_f16, K, N, w.row, kDepth, 64, true};
    return {data, is_f16, N, K, w.row, kShare, kDepth, true};
  }

  // By one thread of each block of the cluster, `rank` among them: its share of the tile from `column` and
  // `k` on, to `to` in all of them; the bytes arrive at `full`.
  static PEFTKERN_DEVICE void load(uint32_t to, const TensorMap* w, uint32_t full, int column, int k,
                                   int rank) {
    const auto part = [&](int at, int row, int first) {
      const uint32_t there = to + static_cast<uint32_t>(at) * kDepth * 2;
      if constexpr (kCluster<Columns> > 1) {
        tile_load_multicast(there, w, full, row, first, (1 << kCluster<Columns>)-1);
      } else {
        tile_load(there, w, full, row, first);
      }
    };
    const int first = rank * kShare;
    if (ByRow) {
#pragma unroll
      for (int i = 0; i < kShare; i += 64) part(first + i, k, column + first + i);
    } else {
      part(first, column + first, k);
    }
  }

  // sums (+)= left times the tile; `left`: the descriptor of a tile of x. fresh: sums hold nothing yet.
  template <class T>
  static PEFTKERN_DEVICE void multiply(float (&sums)[Columns / 2], uint64_t left, uint32_t tile, bool fresh) {
    // Columns side by side in memory: blocks of 64 of them, 8 KiB each.
    const uint64_t right = ByRow ? wgmma_descriptor(tile, 1024, 8192) : wgmma_descriptor(tile, 1024);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k)
      wgmma<T, Columns, false, ByRow>(sums, left + 2 * k, right + (ByRow ? 128 : 2) * k, !(fresh && k == 0));
  }
};

}  // namespace peftkern::cuda::hopper
