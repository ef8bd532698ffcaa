// out = g_b * (x w^T) + drop(scaling * (v * d) (g_d * b)^T) + bias with cp.async,
// ldmatrix and mma: for every architecture from sm_80 on.
//
// A ring of stages in shared memory holds 32 columns of k of the block's rows of x and w; after those of the
// base product come stages of 16 ranks of v and b, as fp32. When such a stage arrives, each value is replaced
// by two bf16 terms (split.h), and the same accumulators go on with three products, v1 b0 + v0 b1 + v0 b0. A
// dropped term is made apart, a few columns of the warp at a time, and added where it is kept.
//
// Pieces of 16 bytes are placed by an exclusive or with their row, so that what ldmatrix reads at once lies
// in different banks.
#include "cuda/lora_linear/lora_linear_sm80.h"

#include "cuda/common/philox.h"
#include "cuda/instructions/launch.h"
#include "cuda/instructions/mma.h"
#include "cuda/instructions/sync.h"
#include "cuda/instructions/warp.h"
#include "cuda/operand/dense.h"
#include "peftkern/cuda.h"

namespace peftkern::cuda {
namespace {

// Row tiles that are walked column by column, so that their operands stay in L2.
constexpr unsigned kGroupRows = 16;

// What may be read in pieces of 16 bytes, and how many steps there are.
struct Access {
  bool x, w, v, b, out;
  int base_steps, steps;
  unsigned row_tiles, column_tiles;
};

template <class T, class Tile, bool ByRow>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    lora_linear_kernel(const LoraLinearArgs args, const Access access) {
  constexpr int kThreads = Tile::kThreads, kRows = Tile::kRows, kColumns = Tile::kColumns;
  constexpr int kDown = Tile::kWarpRows / 16, kAcross = Tile::kWarpColumns / 8, kStages = Tile::kStages;
  constexpr int kXBytes = kRows * 64;
  using Base = DenseTiles<T, kColumns, kThreads, ByRow>;
  unsigned char* shared = shared_memory();
  const int thread = static_cast<int>(threadIdx.x), lane = lane_index(), warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_row = warp / Tile::kWarpsAcross * Tile::kWarpRows;
  const int warp_column = warp % Tile::kWarpsAcross * Tile::kWarpColumns;

  const unsigned per_group = kGroupRows * access.column_tiles, group = blockIdx.x / per_group;
  const unsigned within = blockIdx.x % per_group, rows_left = access.row_tiles - group * kGroupRows;
  const unsigned group_rows = rows_left < kGroupRows ? rows_left : kGroupRows;
  const int row0 = static_cast<int>((group * kGroupRows + within % group_rows) * kRows);
  const int column0 = static_cast<int>(within / group_rows * kColumns);
  const int rows = static_cast<int>(args.M) - row0, columns = static_cast<int>(args.N) - column0;

  const T* x_from = static_cast<const T*>(args.x.data) + row0 * args.x.row;
  const T* w_from = Base::first(args.w, column0);
  const int64_t w_step = Base::step(args.w);

  // `depth` elements of k are left.
  const auto copy_stage = [&](int which, const T* x, const T* w, int depth) {
    const uint32_t to = shared_address(shared) + which * Tile::kStageBytes;
    copy_rows<2, kRows, kThreads>(to, x, args.x.row, rows, depth);
    Base::copy(to + kXBytes, w, args.w.row, depth, columns);
  };
  const auto issue = [&](int step) {
    unsigned char* stage = shared + step % kStages * Tile::kStageBytes;
    if (step < access.base_steps) {
      const T* x = x_from + step * kStageDepth;
      const T* w = w_from + step * w_step;
      const int depth = static_cast<int>(args.K) - step * kStageDepth;
      if (access.x && access.w) {
        copy_stage(step % kStages, x, w, depth);
      } else {
        gather_rows<T, kRows, kThreads>(stage, x, args.x.row, rows, depth);
        Base::gather(stage + kXBytes, w, args.w.row, depth, columns);
      }
    } else if (step < access.steps) {
      const int rank = (step - access.base_steps) * kStageRanks, ranks = static_cast<int>(args.R) - rank;
      const uint32_t to = shared_address(stage);
      if (access.v) {
        copy_rows<4, kRows, kThreads>(to, args.v + row0 * args.R + rank, args.R, rows, ranks);
      } else {
        const ConstMatrix v{args.v, DType::f32, args.R, 1};
        gather_ranks<T, kRows, kThreads>(stage, v, row0, rank, rows, ranks);
      }
      if (access.b) {
        const float* b = static_cast<const float*>(args.b.data) + column0 * args.b.row + rank;
        copy_rows<4, kColumns, kThreads>(to + kXBytes, b, args.b.row, columns, ranks);
      } else {
        gather_ranks<T, kColumns, kThreads>(stage + kXBytes, args.b, column0, rank, columns, ranks);
      }
    }
    copy_commit();
  };

  float sums[kDown][kAcross][4] = {};
  // Where a lane's row for ldmatrix begins in a stage: operand A, operand B.
  const uint32_t at_a = place(warp_row + lane % 16, lane / 16);
  const uint32_t at_b = kXBytes + Base::lane_at(warp_column, lane);

  struct Fragments {
    uint32_t a[kDown][4], b[kAcross][2];
  };
  const auto load_fragments = [&](Fragments& f, int step, int half) {
    const uint32_t stage = shared_address(shared + step % kStages * Tile::kStageBytes);
#pragma unroll
    for (int i = 0; i < kDown; ++i) load_matrices<4>(f.a[i], stage + i * 16 * 64 + (at_a ^ (half * 32)));
#pragma unroll
    for (int j = 0; j < kAcross; j += 2) {
      uint32_t words[4];
      Base::fragments(words, stage, at_b, half, j);
#pragma unroll
      for (int e = 0; e < 4; ++e) f.b[j + e / 2][e % 2] = words[e];
    }
  };
  const auto multiply = [&](const Fragments& f) {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) mma_16x8x16<T>(sums[i][j], f.a[i], f.b[j]);
    }
  };

#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) issue(step);
  // While whole pieces of x and w remain to be copied: fragments are loaded one product ahead, and copies go
  // into the stage that everyone left before the last barrier.
  const int whole = access.x && access.w ? static_cast<int>(args.K / kStageDepth) - (kStages - 1) : 0;
  int step = 0;
  if (whole > 0) {
    Fragments f[2];
    copy_wait<kStages - 2>();
    sync_threads();
    load_fragments(f[0], 0, 0);
    const T* x = x_from + (kStages - 1) * kStageDepth;
    const T* w = w_from + (kStages - 1) * w_step;
#pragma unroll 1
    for (; step < whole; ++step) {
      load_fragments(f[1], step, 1);
      copy_stage((step + kStages - 1) % kStages, x, w, kStageDepth);
      copy_commit();
      x += kStageDepth;
      w += w_step;
      multiply(f[0]);
      copy_wait<kStages - 2>();
      sync_threads();
      load_fragments(f[0], step + 1, 0);
      multiply(f[1]);
    }
  }
#pragma unroll 1
  for (; step < access.base_steps; ++step) {
    copy_wait<kStages - 2>();
    sync_threads();
    issue(step + kStages - 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Fragments f;
      load_fragments(f, step, half);
      multiply(f);
    }
  }

  if (args.scales.g_b != nullptr) {
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = warp_column + 8 * j + 2 * t + e;
        const float scale = n < columns ? args.scales.g_b[column0 + n] : 0.0f;
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
          sums[i][j][e] *= scale;
          sums[i][j][2 + e] *= scale;
        }
      }
    }
  }

  // A lane makes the bits of the rows that its quad shares, for every fourth group of 8 columns: 8 bits a
  // row.
  constexpr int kQuarter = (kAcross + 3) / 4, kWords = (2 * kDown + 3) / 4;
  uint32_t kept[kQuarter][kWords] = {};
  const bool drops = args.dropout.seed != nullptr && args.R > 0;
  if (drops) {
    const auto seed = static_cast<uint64_t>(*args.dropout.seed);
#pragma unroll
    for (int q = 0; q < kQuarter; ++q) {
#pragma unroll
      for (int i = 0; i < 2 * kDown; ++i) {
        const uint32_t bits = keep_bits(seed, row0 + warp_row + 8 * i + g,
                                        (column0 + warp_column) / 8 + 4 * q + t, args.dropout.threshold);
        kept[q][i / 4] |= bits << 8 * (i % 4);
      }
    }
  }

#pragma unroll 1
  for (; step < access.steps; ++step) {
    copy_wait<kStages - 2>();
    sync_threads();
    unsigned char* stage = shared + step % kStages * Tile::kStageBytes;
    const int rank = (step - access.base_steps) * kStageRanks;
    const float factor = args.scaling * args.dropout.keep_scale;
#pragma unroll 1
    for (int i = thread; i < (kRows + kColumns) * 2; i += kThreads) {
      const int row = i / 2, half = i % 2;
      if (row < kRows) {
        split_in_place(stage, row, half, [&](int e) {
          const int r = rank + 8 * half + e;
          return args.scales.d != nullptr && r < args.R ? factor * args.scales.d[r] : factor;
        });
      } else {
        const int n = column0 + row - kRows;
        const float scale = args.scales.g_d != nullptr && n < args.N ? args.scales.g_d[n] : 1.0f;
        split_in_place(stage, row, half, [&](int) { return scale; });
      }
    }
    sync_threads();
    issue(step + kStages - 1);

    const uint32_t from = shared_address(stage);
    uint32_t a[2][kDown][4];
#pragma unroll
    for (int term = 0; term < 2; ++term) {
      // Pieces of a term: `term` and `term` + 2.
      const int piece = lane / 16 * 2 + term;
#pragma unroll
      for (int i = 0; i < kDown; ++i)
        load_matrices<4>(a[term][i], from + place(warp_row + i * 16 + lane % 16, piece));
    }
#pragma unroll
    for (int j = 0; j < kAcross; j += 2) {
      uint32_t words[2][4];
#pragma unroll
      for (int term = 0; term < 2; ++term) {
        const int row = warp_column + j * 8 + lane % 8 + lane / 16 * 8;
        load_matrices<4>(words[term], from + kXBytes + place(row, lane / 8 % 2 * 2 + term));
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t b[2][2] = {{words[0][2 * e], words[0][2 * e + 1]},
                                  {words[1][2 * e], words[1][2 * e + 1]}};
        const auto add = [&](float (&to)[4], int i) {
          mma_16x8x16<bf16>(to, a[1][i], b[0]);
          mma_16x8x16<bf16>(to, a[0][i], b[1]);
          mma_16x8x16<bf16>(to, a[0][i], b[0]);
        };
        if (!drops) {
#pragma unroll
          for (int i = 0; i < kDown; ++i) add(sums[i][j + e], i);
          continue;
        }
        uint32_t mask[kWords];
#pragma unroll
        for (int i = 0; i < kWords; ++i) mask[i] = shuffle(kept[(j + e) / 4][i], lane / 4 * 4 + (j + e) % 4);
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
          float low[4] = {};
          add(low, i);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t bits = mask[(2 * i + h) / 4] >> (8 * ((2 * i + h) % 4) + 2 * t);
            sums[i][j + e][2 * h] += (bits & 1) != 0 ? low[2 * h] : 0.0f;
            sums[i][j + e][2 * h + 1] += (bits & 2) != 0 ? low[2 * h + 1] : 0.0f;
          }
        }
      }
    }
  }
  copy_wait<0>();
  sync_threads();

  // Through shared memory, a part for each warp: rows of whole pieces.
  constexpr int kPieces = Tile::kWarpColumns / 8;
  unsigned char* part = shared + warp * Tile::kWarpRows * Tile::kWarpColumns * 2;
  const auto place_out = [](int row, int piece) {
    return row * kPieces * 16 + ((piece ^ (row / (8 / kPieces) % kPieces)) << 4);
  };
#pragma unroll
  for (int j = 0; j < kAcross; ++j) {
    float bias[2] = {};
    if (args.bias != nullptr) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = warp_column + 8 * j + 2 * t + e;
        if (n >= columns) continue;
        bias[e] = args.bias_dtype == DType::f32 ? static_cast<const float*>(args.bias)[column0 + n]
                                                : to_float(static_cast<const T*>(args.bias)[column0 + n]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kDown; ++i) {
      const float* pair = sums[i / 2][j] + i % 2 * 2;
      *reinterpret_cast<uint32_t*>(part + place_out(8 * i + g, j) + 4 * t) =
          pack<T>(pair[0] + bias[0], pair[1] + bias[1]);
    }
  }
  sync_warp();
#pragma unroll 4
  for (int i = lane; i < Tile::kWarpRows * kPieces; i += 32) {
    const int row = i / kPieces, piece = i % kPieces;
    const int m = warp_row + row, n = warp_column + 8 * piece;
    if (m >= rows || n >= columns) continue;
    const auto* from = reinterpret_cast<const T*>(part + place_out(row, piece));
    T* to = static_cast<T*>(args.out.data) + int64_t{row0 + m} * args.out.row + column0 + n;
    if (access.out && n + 8 <= columns) {
      *reinterpret_cast<Vec16*>(to) = *reinterpret_cast<const Vec16*>(from);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8 && n + e < columns; ++e) to[e] = from[e];
    }
  }
}

template <class T, class Tile>
const char* start(const LoraLinearArgs& args, Access access) {
  access.row_tiles = static_cast<unsigned>((args.M + Tile::kRows - 1) / Tile::kRows);
  access.column_tiles = static_cast<unsigned>((args.N + Tile::kColumns - 1) / Tile::kColumns);
  const unsigned blocks = access.row_tiles * access.column_tiles;
  const Launch how{{blocks}, {Tile::kThreads}, Tile::kShared, args.stream};
  if (args.w_by_row) return launch(how, lora_linear_kernel<T, Tile, true>, args, access);
  return launch(how, lora_linear_kernel<T, Tile, false>, args, access);
}

template <class T>
const char* start(const LoraLinearArgs& args, const Access& access) {
  switch (linear_tile(args.M, args.N, args.multiprocessors)) {
    case LinearTileSize::large:
      return start<T, LargeTile>(args, access);
    case LinearTileSize::medium:
      return start<T, MediumTile>(args, access);
    case LinearTileSize::small:
      return start<T, SmallTile>(args, access);
  }
  return "cudaErrorInvalidValue";
}

}  // namespace

bool lora_linear_sm80_takes(const LoraLinearArgs& args) {
  constexpr int64_t kMost = 0x7fff0000;  // steps and tiles are counted in 32 bits
  const auto half = [&](const auto& m) {
    return m.dtype == args.x.dtype && (m.dtype == DType::bf16 || m.dtype == DType::f16) && m.col == 1;
  };
  const int64_t tiles = ((args.M + SmallTile::kRows - 1) / SmallTile::kRows) *
                        ((args.N + SmallTile::kColumns - 1) / SmallTile::kColumns);
  return half(args.x) && half(args.w) && half(args.out) && args.a.data == nullptr &&
         args.scales.p_b == nullptr && args.scales.p_d == nullptr && args.M < kMost && args.N < kMost &&
         args.K < kMost && args.R < kMost && tiles < kMost &&
         (args.R == 0 || args.b.dtype == DType::f32 || args.b.dtype == args.x.dtype);
}

const char* lora_linear_sm80(const LoraLinearArgs& given) {
  LoraLinearArgs args = given;
  if (args.M == 0 || args.N == 0) return nullptr;
  if (!lora_linear_sm80_takes(args)) return "cudaErrorInvalidValue";
  if (args.dropout.seed == nullptr) args.dropout.keep_scale = 1;
  const auto aligned = [](const auto& m, int64_t size) {
    return m.col == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.row * size % 16 == 0;
  };
  Access access{};
  access.x = aligned(args.x, 2);
  access.w = aligned(args.w, 2);
  access.v = aligned(ConstMatrix{args.v, DType::f32, args.R, 1}, 4);
  access.b = args.b.dtype == DType::f32 && aligned(args.b, 4);
  access.out = aligned(args.out, 2);
  access.base_steps = static_cast<int>((args.K + kStageDepth - 1) / kStageDepth);
  access.steps = access.base_steps + static_cast<int>((args.R + kStageRanks - 1) / kStageRanks);
  return args.x.dtype == DType::bf16 ? start<bf16>(args, access) : start<f16>(args, access);
}

}  // namespace peftkern::cuda
