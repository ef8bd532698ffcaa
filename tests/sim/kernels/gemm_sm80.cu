// C (M, N) = A (M, K) B (N, K)^T, bf16 to fp32, as kernels for sm_80 are built: a ring of cp.async copies,
// ldmatrix, mma. With a `bug` other than 0 it has that bug, for the simulator to find.
#include "cuda/instructions/copy_async.h"
#include "cuda/instructions/launch.h"
#include "cuda/instructions/mma.h"
#include "cuda/instructions/sync.h"
#include "cuda/instructions/warp.h"
#include "export.h"

namespace peftkern::cuda {
namespace {

enum Bug {
  kNone,
  kNoBarrierBeforeReading,
  kNoWaitForCopies,
  kWaitForOneGroupTooFew,
  kOverwriteBeforeBarrier,
  kOneRowTooMany,
  kOneColumnPieceTooMany,
  kWrongRowStride,
  kLaneMissingFromProduct,
  kStoreRowTooMany,
  kSharedTooSmall,
  kUnalignedCopy,
};

constexpr int kTile = 32, kDepth = 32, kStages = 3, kThreads = 64;
constexpr int kRow = kDepth + 8;  // elements; the pad spreads rows over the banks
constexpr int kStageElements = 2 * kTile * kRow;

__global__ void gemm_kernel(const uint16_t* a, const uint16_t* b, int M, int N, int K, float* c, int bug) {
  auto* shared = reinterpret_cast<uint16_t*>(shared_memory());
  const int t = static_cast<int>(threadIdx.x), lane = lane_index(), warp = t / 32;
  const int row0 = static_cast<int>(blockIdx.y) * kTile, column0 = static_cast<int>(blockIdx.x) * kTile;
  const int steps = (K + kDepth - 1) / kDepth;
  const int rows = M + (bug == kOneRowTooMany);

  const auto load = [&](int step) {
    if (step < steps) {
      uint16_t* stage = shared + step % kStages * kStageElements;
      for (int i = t; i < 2 * kTile * (kDepth / 8); i += kThreads) {
        const bool second = i >= kTile * (kDepth / 8);
        const int row = i / (kDepth / 8) % kTile, piece = i % (kDepth / 8), k = step * kDepth + piece * 8;
        const int global_row = (second ? column0 : row0) + row, limit = second ? N : rows;
        const bool inside = global_row < limit && (bug == kOneColumnPieceTooMany ? k <= K : k < K);
        const uint16_t* source = second ? b : a;
        const uint32_t to = shared_address(stage + (second ? kTile * kRow : 0) + row * kRow + piece * 8);
        copy_async<16>(to + (bug == kUnalignedCopy ? 2 : 0),
                       inside ? source + int64_t{global_row} * K + k : source, inside ? 16 : 0);
      }
    }
    copy_commit();
  };

  float sums[4][4] = {};
  for (int s = 0; s < kStages - 1; ++s) load(s);
  for (int step = 0; step < steps; ++step) {
    if (bug == kWaitForOneGroupTooFew) {
      copy_wait<kStages - 1>();
    } else if (bug != kNoWaitForCopies) {
      copy_wait<kStages - 2>();
    }
    if (bug == kOverwriteBeforeBarrier) load(step + kStages - 1);
    if (bug != kNoBarrierBeforeReading) sync_threads();
    // The barrier has also seen everyone leave the stage that this overwrites.
    if (bug != kOverwriteBeforeBarrier) load(step + kStages - 1);
    const uint16_t* stage = shared + step % kStages * kStageElements;
    const int stride = bug == kWrongRowStride ? kDepth : kRow;
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t ra[4];
      load_matrices<4>(ra, shared_address(stage + (16 * warp + lane % 16) * stride + k + lane / 16 * 8));
      for (int j = 0; j < 4; ++j) {
        uint32_t rb[2];
        load_matrices<2>(
            rb, shared_address(stage + kTile * kRow + (8 * j + lane % 8) * kRow + k + lane / 8 % 2 * 8));
        if (bug != kLaneMissingFromProduct || lane != 5) mma_16x8x16<bf16>(sums[j], ra, rb);
      }
    }
  }
  copy_wait<0>();
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + 16 * warp + lane / 4 + i / 2 * 8,
                column = column0 + 8 * j + lane % 4 * 2 + i % 2;
      if (row < M + (bug == kStoreRowTooMany) && column < N) c[int64_t{row} * N + column] = sums[j][i];
    }
  }
}

}  // namespace
}  // namespace peftkern::cuda

PEFTKERN_EXPORT const char* sim_gemm_sm80(const uint16_t* a, const uint16_t* b, int M, int N, int K, float* c,
                                          int bug) {
  using namespace peftkern::cuda;
  const Size3 grid{static_cast<unsigned>((N + kTile - 1) / kTile),
                   static_cast<unsigned>((M + kTile - 1) / kTile)};
  const size_t shared = kStages * kStageElements * 2 - (bug == kSharedTooSmall ? 32 : 0);
  return launch({grid, {kThreads}, shared}, gemm_kernel, a, b, M, N, K, c, bug);
}
