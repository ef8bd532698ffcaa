// The dropout mask on the GPU: one thread per 8 columns of a row, one Philox4x32-7 call each.
#include "cuda/launch.h"
#include "peftkern/launchers.h"

namespace peftkern::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void dropout_mask_kernel(const int64_t* seed, int64_t M, int64_t K, uint32_t threshold,
                                    uint8_t* out) {
  const int64_t groups = (K + 7) / 8;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= M * groups) return;
  const int64_t row = index / groups, group = index % groups;
  const uint64_t key = static_cast<uint64_t>(*seed);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c[4] = {static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32),
                   static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32)};
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const int64_t first = group * 8;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const uint32_t w = c[e >> 1], z = e & 1 ? (w << 16) | (w >> 16) : w;
    if (first + e < K) out[row * K + first + e] = z >= threshold;
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
