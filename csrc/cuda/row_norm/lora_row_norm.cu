// Row norms of w + scaling b a, from one read of w.
//
// A block has a strip of columns and keeps its part of a in shared memory, as terms in the order in which the
// lanes of a product hold them. Warps walk tiles of 16 rows: b a comes out of the tensor cores, 64 columns at
// a time, into registers that belong to the same elements as 16-byte loads of w (the columns of a product may
// come in any order), so that nothing else is exchanged. The sum over a row runs in blocks of 16, 64 columns
// and strips.
#include <cmath>
#include <type_traits>

#include "cuda/common/split.h"
#include "cuda/common/waves.h"
#include "cuda/instructions/launch.h"
#include "cuda/instructions/memory.h"
#include "cuda/instructions/mma.h"
#include "cuda/instructions/sync.h"
#include "cuda/instructions/warp.h"
#include "peftkern/cuda.h"

namespace peftkern::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kPiece = 64;
constexpr int kRanks = 128;  // that a block holds at a time; fewer of them leave room for more columns
constexpr int kBlockRows = 16 * kWarps;
static_assert(kPiece * kRanks * 2 * 3 <= kSharedAnywhere, "a strip of lora_A in three terms");

struct NormPlan {
  int columns;  // of a strip
  int ranks;    // of a chunk
  int64_t strips, chunks, range_rows, ranges;
};

NormPlan norm_plan(int64_t N, int64_t K, int64_t R) {
  NormPlan plan{};
  plan.ranks = R <= 16 ? 16 : R <= 32 ? 32 : R <= 64 ? 64 : kRanks;
  plan.columns = kPiece * kRanks / plan.ranks;
  plan.strips = (K + plan.columns - 1) / plan.columns;
  plan.chunks = (R + plan.ranks - 1) / plan.ranks;
  const int64_t most = (N + kBlockRows - 1) / kBlockRows, wanted = ranges_that_fill(plan.strips, most, 264);
  plan.range_rows = (most + wanted - 1) / wanted * kBlockRows;
  plan.ranges = N == 0 ? 0 : (N + plan.range_rows - 1) / plan.range_rows;
  return plan;
}

// Both operands of a product: bf16 terms of fp32 values, or as they are.
template <class Adapter>
constexpr int kTerms = std::is_same_v<Adapter, float> ? 3 : 1;
template <class T, class Adapter>
using Operand = std::conditional_t<kTerms<Adapter> == 1, T, bf16>;

template <class Adapter>
PEFTKERN_DEVICE void terms_of(float low, float high, uint32_t (&terms)[kTerms<Adapter>]) {
  if constexpr (kTerms<Adapter> == 1) {
    terms[0] = pack<Adapter>(low, high);
  } else {
    split<kTerms<Adapter>>(low, high, terms);
  }
}

// Element (r, c) of the adapter, zero outside.
template <class Adapter>
PEFTKERN_DEVICE float element(const ConstMatrix& m, int64_t i, int64_t j, int64_t rows, int64_t columns) {
  return i < rows && j < columns ? to_float(static_cast<const Adapter*>(m.data)[i * m.row + j * m.col])
                                 : 0.0f;
}

// a's terms for a chunk of ranks: [64 columns][32 columns][pair of tiles][16 ranks][term][lane][4 words].
// Tile j of 32 columns has columns 8 i + 2 j and the next, i = 0 to 3: lane t of a quad gets those of 16
// bytes of w.
template <class Adapter>
PEFTKERN_DEVICE void stage_a(const LoraRowNormArgs& args, const NormPlan& plan, int64_t column0,
                             int64_t rank0, uint32_t* fragments) {
  const int steps = plan.ranks / 16, count = plan.columns * plan.ranks / 2;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const int c = i % plan.columns, pair = i / plan.columns, step = pair / 8;
    const int tile = c % 8 / 2, g = c % 32 / 8 * 2 + c % 2, lane = 4 * g + pair % 4;
    const int64_t r = rank0 + 2 * pair;
    uint32_t terms[kTerms<Adapter>];
    terms_of<Adapter>(element<Adapter>(args.a, r, column0 + c, args.R, args.K),
                      element<Adapter>(args.a, r + 1, column0 + c, args.R, args.K), terms);
    uint32_t* to = fragments + ((c / 32 * 2 + tile / 2) * steps + step) * kTerms<Adapter> * 128 + 4 * lane +
                   tile % 2 * 2 + pair % 8 / 4;
#pragma unroll
    for (int j = 0; j < kTerms<Adapter>; ++j) to[128 * j] = terms[j];
  }
}

// A lane's part of b: rows g and g + 8, 16 ranks; zeros outside.
template <class Adapter>
PEFTKERN_DEVICE void load_b(const LoraRowNormArgs& args, int64_t n, int64_t r,
                            uint32_t (&b)[kTerms<Adapter>][4]) {
  const auto* from = static_cast<const Adapter*>(args.b.data) + n * args.b.row + r * args.b.col;
  const int64_t rows = args.N - n, ranks = args.R - r;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float values[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = w % 2 * 8, rank = w / 2 * 8 + e;
      values[e] = row < rows && rank < ranks ? to_float(from[row * args.b.row + rank * args.b.col]) : 0.0f;
    }
    uint32_t terms[kTerms<Adapter>];
    terms_of<Adapter>(values[0], values[1], terms);
#pragma unroll
    for (int j = 0; j < kTerms<Adapter>; ++j) b[j][w] = terms[j];
  }
}

// A lane's part of 32 columns of w: 8 columns of rows g and g + 8, from `from` on; zeros outside.
PEFTKERN_DEVICE void load_w(const uint16_t* from, int64_t row, int rows, int columns, bool vector,
                            Vec16 (&w)[2]) {
  if (vector && rows > 8 && columns >= 8) {
    w[0] = load_once(reinterpret_cast<const Vec16*>(from));
    w[1] = load_once(reinterpret_cast<const Vec16*>(from + 8 * row));
    return;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int left = 8 * i < rows ? columns : 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t low = 2 * e < left ? from[8 * i * row + 2 * e] : 0;
      const uint32_t high = 2 * e + 1 < left ? from[8 * i * row + 2 * e + 1] : 0;
      w[i].word[e] = low | high << 16;
    }
  }
}

// delta += b a, for 16 rows, 64 columns and 16 ranks. `fragments` are the lane's.
template <class T, class Adapter>
PEFTKERN_DEVICE void add_delta(float (&delta)[8][4], const uint32_t (&b)[kTerms<Adapter>][4],
                               const uint32_t* fragments, int stride) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    uint32_t a[kTerms<Adapter>][2][2];
#pragma unroll
    for (int j = 0; j < kTerms<Adapter>; ++j) {
      const Vec16 four = *reinterpret_cast<const Vec16*>(fragments + pair * stride + 128 * j);
#pragma unroll
      for (int w = 0; w < 4; ++w) a[j][w / 2][w % 2] = four.word[w];
    }
#pragma unroll
    for (int order = kTerms<Adapter> - 1; order >= 0; --order) {
#pragma unroll
      for (int j = 0; j <= order; ++j) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          mma_16x8x16<Operand<T, Adapter>>(delta[2 * pair + tile], b[order - j], a[j][tile]);
        }
      }
    }
  }
}

// Chunked: more ranks than a block holds at a time, and one piece of columns.
template <class T, class Adapter, bool Chunked>
__global__ void __launch_bounds__(kThreads, Chunked ? 1 : 2)
    row_norm_kernel(const LoraRowNormArgs args, const NormPlan plan) {
  auto* fragments = reinterpret_cast<uint32_t*>(shared_memory());
  const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int64_t strip = blockIdx.x % plan.strips, range = blockIdx.x / plan.strips;
  const int64_t column0 = strip * plan.columns;
  const int64_t row1 = (range + 1) * plan.range_rows < args.N ? (range + 1) * plan.range_rows : args.N;
  const int pieces = plan.columns / kPiece, steps = plan.ranks / 16;
  const int stride = steps * kTerms<Adapter> * 128;  // words of two tiles
  const bool vector = reinterpret_cast<uintptr_t>(args.w.data) % 16 == 0 && args.w.row % 8 == 0;

  int64_t n = range * plan.range_rows + 16 * warp + g;
  const int64_t c = column0 + 8 * t;
  const auto* from = static_cast<const uint16_t*>(args.w.data) + n * args.w.row + c;
  const int columns = args.K - c < plan.columns ? static_cast<int>(args.K - c) : plan.columns;
  // Of the range, from the tile that w holds on.
  int rows = static_cast<int>(row1 - n);
  Vec16 w[2][2];  // by 32 columns and row; replaced as soon as they are used
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    load_w(from + 32 * half, args.w.row, rows, columns - 32 * half, vector, w[half]);
  }
  if (!Chunked) stage_a<Adapter>(args, plan, column0, 0, fragments);
  sync_threads();
  // Warps take as many tiles each, so that all meet where a is replaced.
#pragma unroll 1
  for (int64_t block = range * plan.range_rows; block < row1; block += kBlockRows, n += kBlockRows) {
    float sums[2] = {};
    uint32_t b[kTerms<Adapter>][4];
#pragma unroll 1
    for (int piece = 0; piece < (Chunked ? 1 : pieces); ++piece) {
      float delta[8][4] = {};
#pragma unroll 1
      for (int64_t chunk = 0; chunk < (Chunked ? plan.chunks : 1); ++chunk) {
        if (Chunked) {
          sync_threads();
          stage_a<Adapter>(args, plan, column0, chunk * plan.ranks, fragments);
          sync_threads();
        }
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          const int64_t rank = chunk * plan.ranks + 16 * step;
          if (rank >= args.R) break;
          if (steps > 1 || piece == 0) load_b<Adapter>(args, n, rank + 2 * t, b);
          add_delta<T, Adapter>(
              delta, b, fragments + 4 * piece * stride + step * kTerms<Adapter> * 128 + 4 * lane, stride);
        }
      }
      int next = (piece + 1) * kPiece;
      if (Chunked || piece + 1 == pieces) {
        next = 0;
        from += kBlockRows * args.w.row;
        rows -= kBlockRows;
      }
      float piece_sums[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t word = w[half][row].word[i];
            const float low = low_half<T>(word) + args.scaling * delta[4 * half + i][2 * row];
            const float high = high_half<T>(word) + args.scaling * delta[4 * half + i][2 * row + 1];
            piece_sums[row] += low * low;
            piece_sums[row] += high * high;
          }
        }
        load_w(from + next + 32 * half, args.w.row, rows, columns - next - 32 * half, vector, w[half]);
      }
      sums[0] += piece_sums[0];
      sums[1] += piece_sums[1];
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float sum = sums[row];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (t != 0 || n + 8 * row >= args.N) continue;
      if (plan.strips == 1) {
        args.out[n + 8 * row] = sqrtf(sum);
      } else {
        args.partial[strip * args.N + n + 8 * row] = sum;
      }
    }
  }
  grid_launch_dependents();
}

__global__ void __launch_bounds__(kThreads, 4)
    row_norm_finish_kernel(const LoraRowNormArgs args, int64_t strips) {
  grid_wait();
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= args.N) return;
  float sum = 0;
  for (int64_t first = 0; first < strips; first += 8) {
    float block = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (first + i < strips) block += args.partial[(first + i) * args.N + n];
    }
    sum += block;
  }
  args.out[n] = sqrtf(sum);
}

template <class T, class Adapter>
const char* start(const LoraRowNormArgs& args, const NormPlan& plan) {
  const int64_t blocks = plan.strips * plan.ranges;
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "cudaErrorInvalidConfiguration";
  const size_t shared = static_cast<size_t>(plan.columns * plan.ranks * 2 * kTerms<Adapter>);
  const Launch how{{static_cast<unsigned>(blocks)}, {kThreads}, shared, args.stream};
  return plan.chunks > 1 ? launch(how, row_norm_kernel<T, Adapter, true>, args, plan)
                         : launch(how, row_norm_kernel<T, Adapter, false>, args, plan);
}

template <class T>
const char* start(const LoraRowNormArgs& args, const NormPlan& plan) {
  return args.a.dtype == DType::f32 ? start<T, float>(args, plan) : start<T, T>(args, plan);
}

}  // namespace

int64_t lora_row_norm_partials(int64_t N, int64_t K, int64_t R) {
  const int64_t strips = norm_plan(N, K, R).strips;
  return strips == 1 ? 0 : strips * N;
}

const char* lora_row_norm(const LoraRowNormArgs& args) {
  if (args.N == 0) return nullptr;
  const NormPlan plan = norm_plan(args.N, args.K, args.R);
  const char* error = args.w.dtype == DType::bf16  ? start<bf16>(args, plan)
                      : args.w.dtype == DType::f16 ? start<f16>(args, plan)
                                                   : "cudaErrorInvalidValue";
  if (error != nullptr || plan.strips == 1) return error;
  const int64_t blocks = (args.N + kThreads - 1) / kThreads;
  if (blocks > 0x7fffffff) return "cudaErrorInvalidConfiguration";
  Launch how{{static_cast<unsigned>(blocks)}, {kThreads}, 0, args.stream};
  how.dependent = args.dependent && plan.strips > 0;
  return launch(how, row_norm_finish_kernel, args, plan.strips);
}

}  // namespace peftkern::cuda
