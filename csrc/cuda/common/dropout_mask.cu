// The dropout mask on the GPU: one thread per 8 columns of a row, one Philox4x32-7 call each.
#include "cuda/common/philox.h"
#include "cuda/instructions/launch.h"
#include "peftkern/cuda.h"

namespace peftkern::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    dropout_mask_kernel(const int64_t* seed, int64_t M, int64_t K, uint32_t threshold, uint8_t* out) {
  const int64_t groups = (K + 7) / 8;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= M * groups) return;
  const int64_t row = index / groups, group = index % groups;
  const uint32_t kept = keep_bits(static_cast<uint64_t>(*seed), row, group, threshold);
  const int64_t first = group * 8;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (first + e < K) out[row * K + first + e] = kept >> e & 1;
  }
}

}  // namespace

const char* dropout_mask(const int64_t* seed, int64_t M, int64_t K, uint32_t threshold, uint8_t* out,
                         void* stream) {
  const int64_t blocks = (M * ((K + 7) / 8) + kThreads - 1) / kThreads;
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "cudaErrorInvalidConfiguration";
  const Launch how{{static_cast<unsigned>(blocks)}, {kThreads}, 0, stream};
  return launch(how, dropout_mask_kernel, seed, M, K, threshold, out);
}

}  // namespace peftkern::cuda
