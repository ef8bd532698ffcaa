// What backward does between its products, elementwise over M x R; a warp takes a row.
#include "cuda/bottleneck/activation.h"
#include "cuda/instructions/launch.h"
#include "cuda/instructions/warp.h"
#include "peftkern/cuda.h"

namespace peftkern::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads) bottleneck_rank_kernel(const BottleneckRankArgs args) {
  const int64_t m = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (m >= args.M) return;
  const float gate = args.gate != nullptr ? args.gate[m] : 1.0f;
  float dot = 0;
#pragma unroll 2
  for (int64_t r = lane_index(); r < args.R; r += 32) {
    const int64_t at = m * args.R + r;
    const float t = args.t[at];
    if (args.z != nullptr) args.z[at] = gate * activate(args.activation, t);
    if (args.dv == nullptr) continue;
    const float dv = args.dv[at];
    if (args.dgate != nullptr) dot += dv * activate(args.activation, t);
    if (args.dt != nullptr) args.dt[at] = gate * dv * slope(args.activation, t);
  }
  if (args.dgate == nullptr) return;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) dot += shuffle_xor(dot, distance);
  if (lane_index() == 0) args.dgate[m] = args.adds ? args.dgate[m] + dot : dot;
}

}  // namespace

const char* bottleneck_rank(const BottleneckRankArgs& args) {
  if (args.M == 0) return nullptr;
  const int64_t blocks = (args.M + kWarps - 1) / kWarps;
  if (blocks > 0x7fffffff) return "cudaErrorInvalidConfiguration";
  const Launch how{{static_cast<unsigned>(blocks)}, {kThreads}, 0, args.stream};
  return launch(how, bottleneck_rank_kernel, args);
}

}  // namespace peftkern::cuda
