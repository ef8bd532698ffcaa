// How the blocks of a cluster add up their slices of a sum: every block has some quads (4 ranks of a row) of
// which it is the owner. All blocks send their part of a quad into the owner's shared memory, the owner adds
// them in the order of the blocks and sends the result to all. Two trips, each behind an mbarrier that counts
// the bytes; no fence, and no other block is waited for than those whose values are needed.
//
// A block has received all that anyone sends to it when `collect` returns, so it may exit.
#pragma once

#include "cuda/common/pieces.h"
#include "cuda/instructions/cluster.h"
#include "cuda/instructions/mbarrier.h"

namespace peftkern::cuda {

template <int Blocks, int Threads>
struct Exchange {
  int rows, quads, stride;  // stride: floats from a row of v to the next
  uint32_t barriers;        // whether all parts have come, whether all of v has
  float* inbox;             // of each quad that this block owns, the parts of all blocks
  float* v;                 // rows x stride: the sums times their factors

  // Bytes before v.
  __host__ __device__ static constexpr int front(int rows, int quads) {
    return 16 + (rows * quads + Blocks - 1) / Blocks * Blocks * 16;
  }

  // With all threads; `send` comes later, behind cluster_wait.
  PEFTKERN_DEVICE Exchange(unsigned char* shared, int rows, int quads, int stride)
      : rows(rows),
        quads(quads),
        stride(stride),
        barriers(shared_address(shared)),
        inbox(reinterpret_cast<float*>(shared + 16)),
        v(reinterpret_cast<float*>(shared + front(rows, quads))) {
    if (threadIdx.x == 0) {
      mbarrier_init(barriers, 1);
      mbarrier_init(barriers + 8, 1);
      mbarrier_init_fence();
      mbarrier_arrive_expect(barriers, static_cast<uint32_t>(owned() * Blocks * 16));
      mbarrier_arrive_expect(barriers + 8, static_cast<uint32_t>(rows * quads * 16));
    }
    cluster_arrive_relaxed();
  }

  PEFTKERN_DEVICE int owned() const {
    return (rows * quads - static_cast<int>(cluster_rank()) + Blocks - 1) / Blocks;
  }

  PEFTKERN_DEVICE void send(int row, int quad, const Float4& part) const {
    const int at = row * quads + quad;
    const auto owner = static_cast<uint32_t>(at % Blocks);
    const float* slot = inbox + 4 * (at / Blocks * Blocks + static_cast<int>(cluster_rank()));
    cluster_store_async(cluster_address(shared_address(slot), owner), part, cluster_address(barriers, owner));
  }

  // With all threads. Then v is there; factor(rank) is that of a column.
  template <class Factor>
  PEFTKERN_DEVICE void collect(const Factor& factor) const {
    if (static_cast<int>(threadIdx.x) < owned()) mbarrier_wait_cluster(barriers, 0);
    each_owned([&](int row, int quad, Float4 sum) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.value[e] *= factor(4 * quad + e);
      const uint32_t to = shared_address(v + row * stride + quad * 4);
#pragma unroll
      for (uint32_t b = 0; b < Blocks; ++b) {
        cluster_store_async(cluster_address(to, b), sum, cluster_address(barriers + 8, b));
      }
    });
    mbarrier_wait_cluster(barriers + 8, 0);
  }

  // visit(row, quad, sum) for each quad that this block owns, with the thread that has collected it. The
  // parts stay, so it may be called again.
  template <class Visit>
  PEFTKERN_DEVICE void each_owned(const Visit& visit) const {
    const int mine = owned();
    for (int i = static_cast<int>(threadIdx.x); i < mine; i += Threads) {
      Float4 sum = *reinterpret_cast<const Float4*>(inbox + 4 * i * Blocks);
#pragma unroll
      for (int b = 1; b < Blocks; ++b) {
        const Float4 part = *reinterpret_cast<const Float4*>(inbox + 4 * (i * Blocks + b));
#pragma unroll
        for (int e = 0; e < 4; ++e) sum.value[e] += part.value[e];
      }
      const int at = i * Blocks + static_cast<int>(cluster_rank());
      visit(at / quads, at % quads, sum);
    }
  }
};

}  // namespace peftkern::cuda
