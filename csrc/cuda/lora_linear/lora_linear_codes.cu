// out = g_b * (x W^T) + scaling * (v * d) (g_d * b)^T + bias with W in codes, for few rows of x: W is read
// once for 32 of them, and decoded in registers.
//
// A block has 32 rows of W and up to 32 of x. Four warps take turns along the columns of 16 rows of W, four
// along those of the others. A lane loads 16 bytes of codes of two rows of W, some steps ahead, and they are
// its part of W in products that give out^T: within a dot product terms may come in any order if both
// operands agree, so lane t of a quad takes the t-th 16 bytes. x comes to shared memory by asynchronous
// copies, two stages in turn, laid out such that what is read at once lies in different banks.
//
// A sum over k runs over the steps of a warp, then over the four warps; a row's bits depend neither on M nor
// on the other rows. v may come from the launch before, which this one need not wait for until it reads it.
#include <cstring>

#include "cuda/common/stage.h"
#include "cuda/instructions/launch.h"
#include "cuda/instructions/mma.h"
#include "cuda/instructions/sync.h"
#include "cuda/operand/codes.h"
#include "peftkern/code_values.h"
#include "peftkern/cuda.h"

namespace peftkern::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kAlongK = 4;
constexpr int kColumns = 16 * kWarps / kAlongK;  // of out in a block
static_assert(kColumns == 32, "a lane finishes one column");
constexpr int kSumRow = kColumns + 4;  // lanes that store at once do so to different banks
constexpr int kMostTiles = 4;          // of 8 rows of x in a block

template <class L, int Tiles>
struct Stage {
  static constexpr int kRows = 8 * Tiles;
  static constexpr int kAhead = Tiles == 1 || L::kBits == 8 ? 3 : 2;  // steps that codes are under way
  static constexpr int kStep = 4 * L::kRun;                           // columns of k of a warp in a step
  static constexpr int kSpan = kStep * kAlongK;                       // and of the block
  // A quad's runs of 4-bit codes are 64 bytes of x apart: behind every second one a piece is left free.
  static constexpr int kRow = L::kBits == 4 ? kSpan + kSpan / 64 * 8 + 16 : kSpan + 8;
  static constexpr int kElements = kRows * kRow;
  static constexpr size_t kTables = L::kBits == 4 ? sizeof(Tables) : 0;
  static constexpr size_t kStages = 2 * sizeof(bf16) * kElements;
  static constexpr size_t kSums = sizeof(float) * kAlongK * kRows * kSumRow;
  static constexpr size_t kShared = kTables + (kStages > kSums ? kStages : kSums);
  static_assert(kShared <= kSharedAnywhere);

  PEFTKERN_DEVICE static int place(int row, int column) {
    return row * kRow + column + (L::kBits == 4 ? column / 64 * 8 : 0);
  }
};

// Columns k to k + kSpan - 1 of rows m0 and up, zeros where x ends.
template <class T, class L, int Tiles>
PEFTKERN_DEVICE void stage_x(const LoraLinearArgs& args, int64_t m0, int k, bool vector, T* to) {
  using S = Stage<L, Tiles>;
  constexpr int kPieces = S::kSpan / 8;
#pragma unroll
  for (int i = 0; i < S::kRows * kPieces / kThreads; ++i) {
    const int piece = i * kThreads + static_cast<int>(threadIdx.x), row = piece / kPieces;
    const int column = piece % kPieces * 8;
    const int left = m0 + row < args.M ? static_cast<int>(args.K) - k - column : 0;
    const T* from = static_cast<const T*>(args.x.data) + (m0 + row) * args.x.row + k + column;
    T* target = to + S::place(row, column);
    if (vector) {
      const int valid = piece_bytes<2>(left);
      copy_async<16>(shared_address(target), valid > 0 ? from : args.x.data, valid);
    } else {
      gather_piece(reinterpret_cast<unsigned char*>(target), from, left);
    }
  }
}

// sums += a step of W times the lane's part of x, from row `row` and column `column` of the stage on.
template <class T, class L, bool Whole, int Tiles>
PEFTKERN_DEVICE void add_products(const Codes& codes, const Tables& tables, const Run<L, Whole> (&w)[2],
                                  const T* x, int row, int column, float (&sums)[Tiles][4]) {
#pragma unroll
  for (int i = 0; i < L::kRun / 8; ++i) {
    float values[2][8];
    w[0].decode(codes, tables, i, values[0]);
    w[1].decode(codes, tables, i, values[1]);
    uint32_t a[2][4];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float* pair = &values[j % 2][j / 4 * 4 + j % 4 / 2 * 2];
      a[j / 4][j % 4] = pack<T>(pair[0], pair[1]);
    }
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const Vec16 b =
          *reinterpret_cast<const Vec16*>(x + Stage<L, Tiles>::place(8 * tile + row, column + 8 * i));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t words[2] = {b.word[2 * half], b.word[2 * half + 1]};
        mma_16x8x16<T>(sums[tile], a[half], words);
      }
    }
  }
}

// low[i] = sum_r v[rows[i], r] d[r] b[n, r].
template <class T, int Tiles>
PEFTKERN_DEVICE void low_rank(const LoraLinearArgs& args, int64_t n, const int64_t (&rows)[Tiles],
                              float (&low)[Tiles]) {
  const bool wide = args.b.dtype == DType::f32;
#pragma unroll 4
  for (int64_t r = 0; r < args.R; ++r) {
    const int64_t at = n * args.b.row + r * args.b.col;
    float b =
        wide ? static_cast<const float*>(args.b.data)[at] : to_float(static_cast<const T*>(args.b.data)[at]);
    if (args.scales.d != nullptr) b *= args.scales.d[r];
#pragma unroll
    for (int i = 0; i < Tiles; ++i) low[i] += args.v[rows[i] * args.R + r] * b;
  }
}

// Blocks along x: tiles of rows of x, of rows of W.
template <class T, class L, bool Whole, int Tiles>
__global__ void __launch_bounds__(kThreads, 2)
    lora_linear_codes_kernel(const LoraLinearArgs args, const Codes codes, int row_tiles, bool vector) {
  using S = Stage<L, Tiles>;
  auto& tables = *reinterpret_cast<Tables*>(shared_memory());
  auto* stages = reinterpret_cast<T*>(shared_memory() + S::kTables);
  const int lane = lane_index(), g = lane / 4, t = lane % 4, warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_k = warp % kAlongK, warp_n = warp / kAlongK;
  const int64_t m0 = int64_t{blockIdx.x % row_tiles} * S::kRows,
                n0 = int64_t{blockIdx.x / row_tiles} * kColumns;
  const int column = warp_k * S::kStep + t * L::kRun;  // the lane's in a span
  const int spans = static_cast<int>((args.K + S::kSpan - 1) / S::kSpan);

  // Rows past the end are the last one once more: nothing of theirs is stored.
  const auto row_of = [](int64_t row, int64_t rows) { return row < rows ? row : rows - 1; };
  const int64_t rows[2] = {row_of(n0 + 16 * warp_n + g, args.N), row_of(n0 + 16 * warp_n + g + 8, args.N)};
  Run<L, Whole> w[S::kAhead + 1][2];  // of this step, and of those to come
#pragma unroll
  for (int ahead = 0; ahead < S::kAhead; ++ahead) {
#pragma unroll
    for (int i = 0; i < 2; ++i) w[ahead][i].load(codes, rows[i], ahead * S::kSpan + column);
  }
  if (spans > 0) stage_x<T, L, Tiles>(args, m0, 0, vector, stages);
  copy_commit();
  if constexpr (L::kBits == 4) tables.fill(codes);
  float sums[Tiles][4] = {};
#pragma unroll 1
  for (int span = 0; span < spans; ++span) {
    copy_wait<0>();
    sync_threads();  // all have x, and none reads the other stage any more
    const int k = span * S::kSpan;
    if (span + 1 < spans) {
      stage_x<T, L, Tiles>(args, m0, k + S::kSpan, vector, stages + (span + 1) % 2 * S::kElements);
    }
    copy_commit();
#pragma unroll
    for (int i = 0; i < 2; ++i) w[S::kAhead][i].load(codes, rows[i], k + S::kAhead * S::kSpan + column);
    add_products<T, L, Whole, Tiles>(codes, tables, w[0], stages + span % 2 * S::kElements, g, column, sums);
#pragma unroll
    for (int i = 0; i < 2 * S::kAhead; ++i) w[i / 2][i % 2] = w[i / 2 + 1][i % 2];
  }
  sync_threads();  // x has been read

  auto* parts = reinterpret_cast<float*>(stages);
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 8 * tile + 2 * t + i % 2;
      parts[(warp_k * S::kRows + row) * kSumRow + 16 * warp_n + 8 * (i / 2) + g] = sums[tile][i];
    }
  }
  // From here on a lane has a column of out, and a warp every eighth row.
  const int64_t n = row_of(n0 + lane, args.N);
  int64_t out_rows[Tiles];
#pragma unroll
  for (int i = 0; i < Tiles; ++i) out_rows[i] = row_of(m0 + i * kWarps + warp, args.M);
  float low[Tiles] = {};
  grid_wait();
  low_rank<T, Tiles>(args, n, out_rows, low);
  const float g_d = args.scales.g_d != nullptr ? args.scales.g_d[n] : 1.0f;
  float g_b = args.scales.g_b != nullptr ? args.scales.g_b[n] : 1.0f;
  if constexpr (L::kBits == 8) g_b *= row_scale(codes, n);
  const float bias = args.bias != nullptr ? element_of({args.bias, args.bias_dtype}, n) : 0.0f;
  sync_threads();
#pragma unroll
  for (int i = 0; i < Tiles; ++i) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kAlongK; ++j) sum += parts[(j * S::kRows + i * kWarps + warp) * kSumRow + lane];
    const float result = g_b * sum + args.scaling * g_d * low[i] + bias;
    if (m0 + i * kWarps + warp >= args.M || n0 + lane >= args.N) continue;
    static_cast<T*>(args.out.data)[out_rows[i] * args.out.row + n] = from_float<T>(result);
  }
}

template <class T, class L, bool Whole, int Tiles>
const char* start(const LoraLinearArgs& args, const Codes& codes, bool dependent) {
  const int64_t row_tiles = (args.M + 8 * Tiles - 1) / (8 * Tiles);
  const int64_t blocks = row_tiles * ((args.N + kColumns - 1) / kColumns);
  if (blocks > 0x7fffffff) return "cudaErrorInvalidConfiguration";
  const bool vector =
      reinterpret_cast<uintptr_t>(args.x.data) % 16 == 0 && (args.x.row % 8 == 0 || args.M == 1);
  Launch how{{static_cast<unsigned>(blocks)}, {kThreads}, Stage<L, Tiles>::kShared, args.stream};
  how.dependent = dependent;
  return launch(how, lora_linear_codes_kernel<T, L, Whole, Tiles>, args, codes, static_cast<int>(row_tiles),
                vector);
}

template <class T, class L>
const char* start(const LoraLinearArgs& args, const Codes& codes, bool dependent) {
  const Quantised& w = codes.w;
  const auto whole = [](int64_t length) { return length % L::kRun == 0; };
  const bool aligned = reinterpret_cast<uintptr_t>(w.codes) % 16 == 0;
  if (!(aligned && whole(w.K) && whole(w.row) && whole(w.group)))
    return start<T, L, false, kMostTiles>(args, codes, dependent);
  if (args.M <= 8) return start<T, L, true, 1>(args, codes, dependent);
  if (args.M <= 16) return start<T, L, true, 2>(args, codes, dependent);
  return start<T, L, true, kMostTiles>(args, codes, dependent);
}

template <class T>
const char* start(const LoraLinearArgs& args, const Codes& codes, bool dependent) {
  if (codes.w.order == Quantised::Order::bytes) return start<T, Bytes>(args, codes, dependent);
  return codes.w.zeros != nullptr ? start<T, Affine4>(args, codes, dependent)
                                  : start<T, Codebook4>(args, codes, dependent);
}

int log2_of(int64_t power) {
  int log = 0;
  while (int64_t{1} << log < power) ++log;
  return log;
}

bool takes_scales(const Quantised& w) {
  using Number = Quantised::Number;
  const auto power = [](int64_t n) { return n == int64_t{1} << log2_of(n); };
  if (w.flat && !power(w.group)) return false;
  if (w.order == Quantised::Order::bytes)
    return !w.flat && w.rows == 1 && w.groups == 1 && w.zeros == nullptr;
  if (w.zeros != nullptr) return !w.flat && w.rows == 1 && w.number != Number::nested;
  return w.flat && (w.number == Number::f32 || (w.number == Number::nested && power(w.outer_group)));
}

}  // namespace

bool lora_linear_codes_takes(const LoraLinearArgs& args, const Quantised& w) {
  using Order = Quantised::Order;
  const bool known = w.order == Order::bytes ? w.code == Quantised::Code::int8
                                             : w.order == Order::upper_first || w.order == Order::lower_first;
  return known && !w.integers && w.block_bytes == 0 && w.number != Quantised::Number::e8m0 &&
         takes_scales(w) && args.x.col == 1 && args.out.col == 1 && args.K > 0 &&
         args.K < 0x7fffffff - 4096 && args.dropout.seed == nullptr &&
         (args.x.dtype == DType::bf16 || args.x.dtype == DType::f16);
}

const char* lora_linear_codes(const LoraLinearArgs& args, const Quantised& w, bool dependent) {
  if (args.M == 0 || args.N == 0) return nullptr;
  if (!lora_linear_codes_takes(args, w)) return "cudaErrorInvalidValue";
  Codes codes{w, {}, w.flat ? log2_of(w.group) : 0, log2_of(w.outer_group)};
  std::memcpy(codes.values, values_of(w.code), sizeof codes.values);
  return args.x.dtype == DType::bf16 ? start<bf16>(args, codes, dependent)
                                     : start<f16>(args, codes, dependent);
}

}  // namespace peftkern::cuda
