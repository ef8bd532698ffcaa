// The branch onto the residual: a bottleneck's output from v (M, R), or its input's gradient.
//
// A block takes 64 rows and 256 columns, each of its 4 warps 64 of them. v's ranks come 64 at a time, in
// fp32, from L2 for all but the first block of a row tile; f and the split into terms happen on the way to
// shared memory. Row tiles go from the last to the first: of h, read just before, L2 still holds the last
// rows.
#include "cuda/bottleneck/activation.h"
#include "cuda/bottleneck/expand.h"
#include "cuda/instructions/launch.h"
#include "cuda/instructions/sync.h"

namespace peftkern::cuda {
namespace {

constexpr int kThreads = 128, kColumns = kThreads / 32 * kOutColumns;
constexpr int kRanks = 64;  // in shared memory at a time
constexpr size_t kShared = size_t{4} * kOutTiles * kRanks / 16 * kStepWords;
static_assert(kShared <= kSharedAnywhere);

// f of ranks rank0 on, zero outside.
PEFTKERN_DEVICE void stage(const BottleneckOutArgs& args, uint32_t* v, int steps, int64_t row0,
                           int64_t rank0) {
  const bool vector = args.R % 4 == 0 && reinterpret_cast<uintptr_t>(args.v) % 16 == 0;
  const int quads = 4 * steps;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kOutRows * quads; i += kThreads) {
    const int row = i / quads, r = i % quads * 4;
    const int64_t left = row0 + row < args.M ? args.R - rank0 - r : 0;
    const float* from = args.v + (row0 + row) * args.R + rank0 + r;
    Float4 four{};
    if (vector && left >= 4) {
      four = *reinterpret_cast<const Float4*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) four.value[e] = e < left ? from[e] : 0.0f;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) four.value[e] = e < left ? activate(args.activation, four.value[e]) : 0.0f;
    store_ranks(v, steps, row, r, four.value[0], four.value[1]);
    store_ranks(v, steps, row, r + 2, four.value[2], four.value[3]);
  }
}

template <class T, class Adapter>
__global__ void __launch_bounds__(kThreads, 2)
    bottleneck_out_kernel(const BottleneckOutArgs args, int64_t strips) {
  auto* v = reinterpret_cast<uint32_t*>(shared_memory());
  const int64_t row0 = (gridDim.x / strips - 1 - blockIdx.x / strips) * kOutRows;
  const int64_t first = blockIdx.x % strips * kColumns + threadIdx.x / 32 * kOutColumns;
  OutTile<T, Adapter> tile(args, first);
#pragma unroll 1
  for (int64_t rank0 = 0; rank0 < args.R; rank0 += kRanks) {
    const int ranks = args.R - rank0 < kRanks ? static_cast<int>(args.R - rank0) : kRanks;
    const int steps = (ranks + 15) / 16;
    if (rank0 > 0) sync_threads();
    stage(args, v, steps, row0, rank0);
    sync_threads();
    if (first < args.N) tile.add(v, steps, rank0);
  }
  if (first < args.N) tile.store(row0);
}

template <class T>
const char* start(const BottleneckOutArgs& args, const Launch& how, int64_t strips) {
  return args.b.dtype == DType::f32 ? launch(how, bottleneck_out_kernel<T, float>, args, strips)
                                    : launch(how, bottleneck_out_kernel<T, T>, args, strips);
}

}  // namespace

const char* bottleneck_out(const BottleneckOutArgs& given) {
  BottleneckOutArgs args = given;
  if (args.M == 0 || args.N == 0) return nullptr;
  if (args.dropout.seed == nullptr) args.dropout.keep_scale = 1;
  const int64_t strips = (args.N + kColumns - 1) / kColumns,
                blocks = (args.M + kOutRows - 1) / kOutRows * strips;
  if (blocks > 0x7fffffff || args.N > 0x7fffffff - kColumns) return "cudaErrorInvalidConfiguration";
  const Launch how{{static_cast<unsigned>(blocks)}, {kThreads}, kShared, args.stream};
  return args.out.dtype == DType::bf16  ? start<bf16>(args, how, strips)
         : args.out.dtype == DType::f16 ? start<f16>(args, how, strips)
                                        : "cudaErrorInvalidValue";
}

}  // namespace peftkern::cuda
