// out = (drop(in) * scale) p^T + bias, a tall matrix against a few rows: one pass over `in` at the memory's
// speed.
//
// A block takes 64 rows and 16, 32 or 64 ranks; of its 8 warps four share the rows and two the columns. A
// lane copies 16 bytes of a row, 8 adjacent columns, into a ring of its own, and they are its part of two mma
// operands: within a dot product columns may come in any order if both operands agree, so lane t of a quad
// takes columns 8t to 8t + 7 of 32. No lane reads what another has copied, and one Philox call is the mask of
// a piece. The adapter is brought into the same order, split into bf16 terms (split.h) and kept in shared
// memory, two tiles in turn.
//
// The sum over columns runs in blocks of fixed size: products start from zero every 128 columns of a warp,
// the column groups' parts of 1024 columns make a chunk, and chunks are added in order. With few rows chunks
// go through memory, from several blocks to a second kernel, which adds them in the same order: same bits.
#include <type_traits>

#include "cuda/common/philox.h"
#include "cuda/common/split.h"
#include "cuda/common/vector.h"
#include "cuda/instructions/copy_async.h"
#include "cuda/instructions/launch.h"
#include "cuda/instructions/memory.h"
#include "cuda/instructions/mma.h"
#include "cuda/instructions/sync.h"
#include "cuda/instructions/warp.h"
#include "peftkern/cuda.h"

namespace peftkern::cuda {
namespace {

constexpr int kThreads = 256, kRows = 64, kGroups = 2;
constexpr int kStep = 32 * kGroups;                            // columns of a step, 32 of each column group
constexpr int kSteps = 4;                                      // after which products start from zero again
constexpr int kChunkSteps = 16, kChunk = kChunkSteps * kStep;  // columns whose sum is one term of the result
constexpr int kManyTiles = 96;                                 // enough blocks without chunks of columns
constexpr int kBlocks = 264;                                   // wanted otherwise, about two a multiprocessor

// How 8 * Tiles ranks are worked on. Native: the adapter enters as it is.
template <class T, bool Native, int Tiles>
struct Shape {
  using Kind = std::conditional_t<Native, T, bf16>;
  static constexpr int kInTerms = !Native && std::is_same_v<T, f16> ? 2 : 1;
  static constexpr int kTerms = Native ? 1 : 3;
  static constexpr int kPieces = Tiles == 8 ? 2 : 1;       // of 8 columns of the adapter that a thread brings
  static constexpr int kTermVectors = kThreads * kPieces;  // of one term of an adapter tile
  static constexpr int kTileVectors = kTerms * kTermVectors;
  static constexpr int kTileSteps = kTermVectors / (kGroups * Tiles * 32);
  static constexpr int kDepth = Tiles == 8 ? 4 : 6;  // steps under way
  static constexpr int kRing = kDepth * 2 * kThreads;
  static constexpr int kSumVectors = Tiles * kThreads / kGroups;
  static constexpr size_t kShared = 16 * (2 * kTileVectors + kRing + kSumVectors);
  static_assert(kTileSteps > 0 && kSteps % kTileSteps == 0 && kShared <= kSharedAnywhere);
};

// 8 values of 16 bits, `stride` apart, zeros from `left` on. vector: adjacent, and p is aligned.
template <class T>
PEFTKERN_DEVICE Vec16 load_eight(const T* p, int64_t stride, int left, bool vector) {
  Vec16 v{};
  if (vector && left >= 8) {
    v = load_once(reinterpret_cast<const Vec16*>(p));
  } else if (left > 0) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < left) v.word[e / 2] |= static_cast<uint32_t>(p[e * stride].bits) << 16 * (e % 2);
    }
  }
  return v;
}

// 8 columns of a row of the adapter on their way to shared memory.
template <class T, bool Native>
struct Piece {
  float values[8];

  PEFTKERN_DEVICE void load(const LoraShrinkArgs& args, int64_t r, int c, bool vector) {
    const int left = r < args.R ? static_cast<int>(args.C) - c : 0;
    const int64_t at = r * args.p.row + c * args.p.col;
    const auto* wide = static_cast<const float*>(args.p.data) + at;
    const auto* narrow = static_cast<const T*>(args.p.data) + at;
    if (vector && left >= 8) {
      union {
        Vec16 words[2];
        float each[8];
      } loaded;
      loaded.words[0] = load_once(reinterpret_cast<const Vec16*>(wide));
      loaded.words[1] = load_once(reinterpret_cast<const Vec16*>(wide) + 1);
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] = loaded.each[e];
    } else {
      const bool is_wide = args.p.dtype == DType::f32;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        values[e] = 0;
        if (e < left && is_wide) values[e] = wide[e * args.p.col];
        if (e < left && !is_wide) values[e] = to_float(narrow[e * args.p.col]);
      }
    }
    if (args.scale != nullptr) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < left) values[e] *= args.scale[c + e];
      }
    }
  }

  // The terms, `distance` apart.
  PEFTKERN_DEVICE void store(Vec16* to, int distance) const {
    Vec16 out[3];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t terms[3];
      split<3>(values[2 * i], values[2 * i + 1], terms);
#pragma unroll
      for (int j = 0; j < 3; ++j) out[j].word[i] = terms[j];
    }
#pragma unroll
    for (int j = 0; j < 3; ++j) to[j * distance] = out[j];
  }
};

template <class T>
struct Piece<T, true> {
  Vec16 values;

  PEFTKERN_DEVICE void load(const LoraShrinkArgs& args, int64_t r, int c, bool vector) {
    const T* p = static_cast<const T*>(args.p.data) + r * args.p.row + c * args.p.col;
    values = load_eight(p, args.p.col, r < args.R ? static_cast<int>(args.C) - c : 0, vector);
  }
  PEFTKERN_DEVICE void store(Vec16* to, int) const { *to = values; }
};

// The mma operands of 16 rows and 32 columns, of which a lane has 8 columns of two rows: [term][half][word].
template <int Terms>
PEFTKERN_DEVICE void operands(const Vec16& upper, const Vec16& lower, uint32_t (&a)[Terms][2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int half = i / 2, word = i % 2 * 2;
    if constexpr (Terms == 1) {
      a[0][half][word] = upper.word[i];
      a[0][half][word + 1] = lower.word[i];
    } else {
      uint32_t first[2], second[2];
      split_f16(upper.word[i], first);
      split_f16(lower.word[i], second);
#pragma unroll
      for (int term = 0; term < 2; ++term) {
        a[term][half][word] = first[term];
        a[term][half][word + 1] = second[term];
      }
    }
  }
}

// sums += rows times 8 ranks over 32 columns.
template <class Kind, int InTerms, int Terms>
PEFTKERN_DEVICE void products(float (&sums)[4], const uint32_t (&a)[InTerms][2][4], const Vec16 (&b)[Terms]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int order = Terms - 1; order >= 0; --order) {
#pragma unroll
      for (int i = 0; i < InTerms; ++i) {
        if (order - i < 0) continue;
        const Vec16& term = b[order - i];
        const uint32_t words[2] = {term.word[2 * half], term.word[2 * half + 1]};
        mma_16x8x16<Kind>(sums, a[i][half], words);
      }
    }
  }
}

struct alignas(16) Sums {
  float value[4];
};

// Blocks along x: rank tiles of row tiles; along y: groups of `chunks` chunks. args.partial: chunks are
// written there, else their sum to args.out.
template <class T, bool Native, int Tiles>
__global__ void __launch_bounds__(kThreads, Tiles == 8 ? 1 : 2)
    lora_shrink_kernel(const LoraShrinkArgs args, int rank_tiles, int chunks, bool in_vector, bool p_vector) {
  using S = Shape<T, Native, Tiles>;
  auto* tiles = reinterpret_cast<Vec16*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), lane = lane_index(), warp = thread / 32;
  const int group = warp % kGroups, g = lane / 4, t = lane % 4;
  Vec16* ring = tiles + 2 * S::kTileVectors + thread;
  auto* handed = reinterpret_cast<Sums*>(tiles + 2 * S::kTileVectors + S::kRing) + warp / kGroups * 32 + lane;
  constexpr int kHandedStride = kThreads / kGroups;
  const int64_t row = int64_t{blockIdx.x / rank_tiles} * kRows + warp / kGroups * 16 + g;
  const int64_t rank = int64_t{blockIdx.x % rank_tiles} * 8 * Tiles;
  const int columns = static_cast<int>(args.C), first = static_cast<int>(blockIdx.y) * chunks * kChunk;
  const int left_over = (columns - first + kStep - 1) / kStep, most = chunks * kChunkSteps;
  const int steps = left_over < most ? left_over : most;
  const int ranks = static_cast<int>(args.R - rank);
  const bool busy = row - g < args.M;  // else none of the warp's rows exists
  const bool exists[2] = {row < args.M, row + 8 < args.M};
  const T* rows[2] = {static_cast<const T*>(args.in.data) + row * args.in.row};
  rows[1] = rows[0] + 8 * args.in.row;
  const uint64_t seed = args.dropout.seed != nullptr ? static_cast<uint64_t>(*args.dropout.seed) : 0;

  Piece<T, Native> pieces[S::kPieces];
  float sums[Tiles][4] = {}, chunk[Tiles][4] = {}, total[Tiles][4] = {};
  for (int s = 1 - S::kDepth; s < steps; ++s) {
    const int coming = s + S::kDepth - 1;
    if (busy && coming < steps) {
      const int c = first + coming * kStep + group * 32 + 8 * t;
      Vec16* to = ring + coming % S::kDepth * 2 * kThreads;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int left = exists[i] && c < columns ? columns - c : 0;
        if (in_vector) {
          copy_async<16>(shared_address(to + i * kThreads), left > 0 ? rows[i] + c : args.in.data,
                         left < 8 ? 2 * left : 16);
        } else {
          to[i * kThreads] = load_eight(rows[i] + c, 1, left, false);
        }
      }
    }
    copy_commit();
    const int tile = s / S::kTileSteps;
    const bool new_tile = s >= 0 && s % S::kTileSteps == 0;
    // A barrier has passed since this buffer was last read, two tiles ago.
    Vec16* buffer = tiles + tile % 2 * S::kTileVectors;
    if (new_tile) {
#pragma unroll
      for (int i = 0; i < S::kPieces; ++i) pieces[i].store(buffer + i * kThreads + thread, S::kTermVectors);
    }
    if (new_tile || s == -1) {
      const int next = first + (s < 0 ? 0 : tile + 1) * S::kTileSteps * kStep;
#pragma unroll
      for (int i = 0; i < S::kPieces; ++i) {
        const int block = (thread + i * kThreads) / 32;  // 8 ranks, 32 columns
        pieces[i].load(args, rank + block % Tiles * 8 + g, next + block / Tiles * 32 + 8 * t, p_vector);
      }
    }
    if (s < 0) continue;
    if (new_tile) sync_threads();
    copy_wait<S::kDepth - 1>();

    if (busy) {
      Vec16 upper = ring[s % S::kDepth * 2 * kThreads], lower = ring[(s % S::kDepth * 2 + 1) * kThreads];
      if (args.dropout.seed != nullptr) {
        const int piece = (first + s * kStep + group * 32) / 8 + t;
        drop_halves(upper.word, seed, row, piece, args.dropout.threshold);
        drop_halves(lower.word, seed, row + 8, piece, args.dropout.threshold);
      }
      uint32_t a[S::kInTerms][2][4];
      operands<S::kInTerms>(upper, lower, a);
      const Vec16* from = buffer + (s % S::kTileSteps * kGroups + group) * Tiles * 32 + lane;
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
        if (8 * n >= ranks) continue;
        Vec16 b[S::kTerms];
#pragma unroll
        for (int i = 0; i < S::kTerms; ++i) b[i] = from[i * S::kTermVectors + n * 32];
        products<typename S::Kind, S::kInTerms, S::kTerms>(sums[n], a, b);
      }
    }
    const bool end_of_block = s + 1 == steps;
    if ((s + 1) % kSteps == 0 || end_of_block) {
#pragma unroll
      for (int i = 0; i < 4 * Tiles; ++i) {
        chunk[i / 4][i % 4] += sums[i / 4][i % 4];
        sums[i / 4][i % 4] = 0;
      }
    }
    if ((s + 1) % kChunkSteps != 0 && !end_of_block) continue;

    if (group != 0) {
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
        handed[n * kHandedStride] = {chunk[n][0], chunk[n][1], chunk[n][2], chunk[n][3]};
      }
    }
    sync_threads();
    if (group == 0) {
      float* partial = nullptr;
      if (args.partial != nullptr)
        partial = args.partial + (first / kChunk + s / kChunkSteps) * args.M * args.R;
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
        const Sums other = handed[n * kHandedStride];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float sum = chunk[n][i] + other.value[i];
          const int r = 8 * n + 2 * t + i % 2;
          total[n][i] += sum;
          if (partial != nullptr && exists[i / 2] && r < ranks)
            partial[(row + i / 2 * 8) * args.R + rank + r] = sum;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * Tiles; ++i) chunk[i / 4][i % 4] = 0;
  }

  if (group != 0 || args.partial != nullptr) return;
  const float factor = args.alpha * args.dropout.keep_scale;
#pragma unroll
  for (int n = 0; n < Tiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = 8 * n + 2 * t + i % 2;
      if (!exists[i / 2] || r >= ranks) continue;
      const float scale = args.d != nullptr ? args.d[rank + r] : 1.0f;
      const float bias = args.bias.data != nullptr ? element_of(args.bias, rank + r) : 0.0f;
      args.out[(row + i / 2 * 8) * args.R + rank + r] = total[n][i] * factor * scale + bias;
    }
  }
}

__global__ void __launch_bounds__(kThreads) add_chunks_kernel(const LoraShrinkArgs args, int chunks) {
  const int64_t size = args.M * args.R, i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
#pragma unroll 4
  for (int chunk = 0; chunk < chunks; ++chunk) sum += args.partial[chunk * size + i];
  const float scale = args.d != nullptr ? args.d[i % args.R] : 1.0f;
  const float bias = args.bias.data != nullptr ? element_of(args.bias, i % args.R) : 0.0f;
  args.out[i] = sum * (args.alpha * args.dropout.keep_scale) * scale + bias;
}

// The blocks of a launch: chunks of a block, and whether chunks go through memory.
struct Plan {
  int64_t ranks, row_tiles, rank_tiles, chunks, per_block;  // ranks: of a block
  bool partial;
};

Plan plan(int64_t M, int64_t C, int64_t R) {
  Plan p{};
  p.ranks = R <= 16 ? 16 : R <= 32 ? 32 : 64;
  p.row_tiles = (M + kRows - 1) / kRows;
  p.rank_tiles = (R + p.ranks - 1) / p.ranks;
  p.chunks = p.per_block = (C + kChunk - 1) / kChunk;
  const int64_t tiles = p.row_tiles * p.rank_tiles;
  if (tiles > 0 && tiles < kManyTiles && p.chunks > 1) {
    p.partial = true;
    const int64_t groups = kBlocks / tiles;
    p.per_block = (p.chunks + groups - 1) / groups;
  }
  return p;
}

template <class T, bool Native>
const char* start(const LoraShrinkArgs& args, const Plan& p) {
  const auto aligned = [](const ConstMatrix& m, int64_t size) {
    return m.col == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.row * size % 16 == 0;
  };
  const bool in_vector = aligned(args.in, 2);
  const bool p_vector = Native ? aligned(args.p, 2) : args.p.dtype == DType::f32 && aligned(args.p, 4);
  const int64_t groups = p.partial ? (p.chunks + p.per_block - 1) / p.per_block : 1;
  Launch how{{static_cast<unsigned>(p.row_tiles * p.rank_tiles), static_cast<unsigned>(groups)}, {kThreads}};
  how.stream = args.stream;
  const auto go = [&](auto kernel, size_t shared) {
    how.shared = shared;
    return launch(how, kernel, args, static_cast<int>(p.rank_tiles), static_cast<int>(p.per_block), in_vector,
                  p_vector);
  };
  if (p.ranks == 64) return go(lora_shrink_kernel<T, Native, 8>, Shape<T, Native, 8>::kShared);
  if (p.ranks == 32) return go(lora_shrink_kernel<T, Native, 4>, Shape<T, Native, 4>::kShared);
  return go(lora_shrink_kernel<T, Native, 2>, Shape<T, Native, 2>::kShared);
}

template <class T>
const char* start(const LoraShrinkArgs& args, const Plan& p) {
  // A scaled adapter is an fp32 value.
  const bool native = args.p.dtype == args.in.dtype && args.scale == nullptr;
  return native ? start<T, true>(args, p) : start<T, false>(args, p);
}

}  // namespace

int64_t lora_shrink_partials(int64_t M, int64_t C, int64_t R, DType) {
  const Plan p = plan(M, C, R);
  return p.partial ? p.chunks * M * R : 0;
}

const char* lora_shrink(const LoraShrinkArgs& given) {
  LoraShrinkArgs args = given;
  if (args.M == 0 || args.R == 0) return nullptr;
  const Plan p = plan(args.M, args.C, args.R);
  if (p.row_tiles * p.rank_tiles > 0x7fffffff || p.chunks > 0x7fffffff)
    return "cudaErrorInvalidConfiguration";
  if (!p.partial) args.partial = nullptr;
  if (args.dropout.seed == nullptr) args.dropout.keep_scale = 1;
  const char* error = args.in.dtype == DType::bf16  ? start<bf16>(args, p)
                      : args.in.dtype == DType::f16 ? start<f16>(args, p)
                                                    : "cudaErrorInvalidValue";
  if (error != nullptr || !p.partial) return error;
  const auto blocks = (args.M * args.R + kThreads - 1) / kThreads;
  const Launch how{{static_cast<unsigned>(blocks)}, {kThreads}, 0, args.stream};
  return launch(how, add_chunks_kernel, args, static_cast<int>(p.chunks));
}

}  // namespace peftkern::cuda
