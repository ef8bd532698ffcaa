// C (M, N) = A (M, K) B (N, K)^T, bf16 to fp32, as kernels for sm_90a are built: one warp loads tiles by TMA,
// a warpgroup multiplies them, mbarriers hand the stages over. With a `bug` other than 0 it has that bug.
#include "cuda/instructions/launch.h"
#include "cuda/instructions/mbarrier.h"
#include "cuda/instructions/sync.h"
#include "cuda/instructions/tma.h"
#include "cuda/instructions/wgmma.h"
#include "export.h"

namespace peftkern::cuda {
namespace {

enum Bug {
  kNone,
  kNoWaitForFull,
  kNoWaitForEmpty,
  kWrongPhaseOfFull,
  kWrongPhaseOfEmpty,
  kTooFewBytesExpected,
  kTooManyBytesExpected,
  kReleaseBeforeProductsAreDone,
  kNoWaitBeforeStoring,
  kNoFence,
  kNoBarrierAfterInit,
  kWrongStride,
  kWrongStepAlongK,
  kNoSwizzle,
  kTooManyArrivals,
  kStageUnaligned,
  kNobodyReleases,
};

constexpr int kTile = 64, kStages = 2, kThreads = 160;
constexpr uint32_t kTileBytes = kTile * kTile * 2, kStageBytes = 2 * kTileBytes;

__global__ void __launch_bounds__(kThreads)
    gemm_kernel(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, int M,
                int N, int K, float* c, int bug) {
  unsigned char* const raw = shared_memory();
  const uint32_t up = (1024 - shared_address(raw) % 1024) % 1024 + (bug == kStageUnaligned ? 128 : 0);
  const uint32_t stages = shared_address(raw) + up, full = stages + kStages * kStageBytes,
                 empty = full + 8 * kStages;
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32;
  const int row0 = static_cast<int>(blockIdx.y) * kTile, column0 = static_cast<int>(blockIdx.x) * kTile;
  const int steps = (K + kTile - 1) / kTile;
  if (t == 0) {
    for (uint32_t s = 0; s < kStages; ++s) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, 4);
    }
    mbarrier_init_fence();
  }
  if (bug != kNoBarrierAfterInit) sync_threads();

  if (warp == 4) {
    if (lane != 0) return;
    for (int step = 0; step < steps; ++step) {
      const auto s = static_cast<uint32_t>(step % kStages),
                 parity = static_cast<uint32_t>(step / kStages % 2);
      if (bug != kNoWaitForEmpty) mbarrier_wait(empty + 8 * s, parity ^ (bug == kWrongPhaseOfEmpty ? 0 : 1));
      const uint32_t bytes = bug == kTooFewBytesExpected    ? kTileBytes
                             : bug == kTooManyBytesExpected ? kStageBytes + 128
                                                            : kStageBytes;
      mbarrier_arrive_expect(full + 8 * s, bytes);
      tile_load(stages + s * kStageBytes, &map_a, full + 8 * s, row0, step * kTile);
      tile_load(stages + s * kStageBytes + kTileBytes, &map_b, full + 8 * s, column0, step * kTile);
    }
    return;
  }

  float sums[kTile / 2] = {};
  for (int step = 0; step < steps; ++step) {
    const auto s = static_cast<uint32_t>(step % kStages), parity = static_cast<uint32_t>(step / kStages % 2);
    if (bug != kNoWaitForFull) mbarrier_wait(full + 8 * s, parity ^ (bug == kWrongPhaseOfFull ? 1 : 0));
    if (bug != kNoFence) wgmma_fence();
    const uint32_t stride = bug == kWrongStride ? 512 : 1024;
    for (uint32_t k = 0; k < kTile / 16; ++k) {
      const uint32_t at = stages + s * kStageBytes + k * (bug == kWrongStepAlongK ? 16 : 32);
      wgmma<bf16, kTile>(sums, wgmma_descriptor(at, stride), wgmma_descriptor(at + kTileBytes, stride), true);
    }
    wgmma_commit();
    if (bug != kReleaseBeforeProductsAreDone && bug != kNoWaitBeforeStoring) wgmma_wait<0>();
    if (bug == kNoWaitBeforeStoring && step + 1 < steps) wgmma_wait<0>();
    if ((lane == 0 || bug == kTooManyArrivals) && bug != kNobodyReleases) mbarrier_arrive(empty + 8 * s);
    if (bug == kReleaseBeforeProductsAreDone) wgmma_wait<0>();
  }
  for (int i = 0; i < kTile / 2; ++i) {
    const int row = row0 + 16 * warp + lane / 4 + i / 2 % 2 * 8,
              column = column0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < M && column < N) c[int64_t{row} * N + column] = sums[i];
  }
}

}  // namespace
}  // namespace peftkern::cuda

PEFTKERN_EXPORT const char* sim_gemm_sm90(uint16_t* a, uint16_t* b, int M, int N, int K, float* c, int bug) {
  using namespace peftkern::cuda;
  TensorMap map_a, map_b;
  const bool swizzle = bug != kNoSwizzle;
  if (const char* e = encode_tensor_map({a, false, M, K, K, kTile, kTile, swizzle}, &map_a)) return e;
  if (const char* e = encode_tensor_map({b, false, N, K, K, kTile, kTile, swizzle}, &map_b)) return e;
  const Size3 grid{static_cast<unsigned>((N + kTile - 1) / kTile),
                   static_cast<unsigned>((M + kTile - 1) / kTile)};
  const size_t shared = 1024 + 128 + kStages * kStageBytes + 16 * kStages;
  return launch({grid, {kThreads}, shared}, gemm_kernel, map_a, map_b, M, N, K, c, bug);
}
