// v = drop(x) lora_A^T within the launch, by three warps: 48 rows at a time, whoever takes the ticket for
// them.
//
// Rows of x go from memory straight into operands: within 32 columns a lane takes 8 that are adjacent, 16
// bytes, for two products, and lora_A follows the same order, so the sums are the same. The terms of lora_A
// are made once for all three warps, 64 columns at a time, while those before are multiplied.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/lora_linear_sm90_rank.h"
#include "cuda/mma.h"
#include "cuda/warp.h"

namespace peftkern::cuda::hopper {

constexpr int kBlockDepth = 256;  // columns of x that go into one fresh sum

PEFTKERN_DEVICE float as_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// T is x's type. lora_A enters as bf16 terms: three if it is fp32, two if it is fp16 (exact, as are the two
// of an fp16 x), one if it is bf16.
template <class T>
struct Shrink {
  static constexpr bool kSplitsX = std::is_same_v<T, f16>;
  static constexpr int kGroups = kMaxMadeRank / 8;
  // A thread takes 8 of a tile's 64 columns of lora_A, of every 12th row.
  static constexpr int kRankStep = kAdapterThreads / 8, kChunks = (kMaxMadeRank + kRankStep - 1) / kRankStep;
  static constexpr int kTermBytes = kMaxMadeRank * kDepth * 2;
  static constexpr int kAhead = 4;  // blocks of 32 columns whose loads are under way

  const LoraLinearArgs& args;
  unsigned char* terms;  // two buffers of three terms of a tile: for 32 columns, row by row
  int t, lane, rank, count, groups;
  int64_t row;             // of this lane's first row; the other is 8 below
  const T* x[2];           // this lane's rows, from its first column of the tile on; null outside the matrix
  const unsigned char* a;  // this thread's first row of lora_A, from its columns of the tile to be read on
  int64_t a_rows;          // bytes from there to its next row
  int left_x, left_a;      // columns from there to the end
  bool wide;               // lora_A is fp32

  PEFTKERN_DEVICE Shrink(const LoraLinearArgs& args, unsigned char* terms, int t, int64_t first)
      : args(args), terms(terms), t(t), lane(t % 32), rank(t / 8), row(first + t / 32 * 16 + t % 32 / 4) {
    wide = args.a.dtype == DType::f32;
    count = wide ? 3 : kSplitsX ? 2 : 1;
    groups = static_cast<int>(args.R + 7) / 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t mine = row + 8 * half;
      x[half] =
          mine < args.M ? static_cast<const T*>(args.x.data) + mine * args.x.row + lane % 4 * 8 : nullptr;
    }
    const int64_t row_bytes = args.a.row * (wide ? 4 : 2);
    a = static_cast<const unsigned char*>(args.a.data) + rank * row_bytes + t % 8 * (wide ? 32 : 16);
    a_rows = kRankStep * row_bytes;
    left_x = static_cast<int>(args.K) - lane % 4 * 8;
    left_a = static_cast<int>(args.K) - t % 8 * 8;
  }

  // 8 adjacent columns of each of this thread's rows of lora_A, of the next tile.
  PEFTKERN_DEVICE void load_a(Vec16 (&to)[kChunks][2]) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const unsigned char* p = a + i * a_rows;
      to[i][0] = to[i][1] = {};
      if (rank + i * kRankStep >= args.R || left_a <= 0) continue;
      if (left_a >= 8) {
        to[i][0] = *reinterpret_cast<const Vec16*>(p);
        if (wide) to[i][1] = *reinterpret_cast<const Vec16*>(p + 16);
      } else {
        load_tail(to[i], p, wide ? left_a : (left_a + 1) / 2, !wide && left_a % 2 != 0);
      }
    }
    a += kDepth * (wide ? 4 : 2);
    left_a -= kDepth;
  }
  // `words` words, of the last of which only the lower half is there if `half`.
  PEFTKERN_DEVICE void load_tail(Vec16 (&to)[2], const unsigned char* p, int words, bool half) const {
#pragma unroll 1
    for (int i = words - 1; i >= 0; --i) {
#pragma unroll
      for (int e = 7; e > 0; --e) to[e / 4].word[e % 4] = to[(e - 1) / 4].word[(e - 1) % 4];
      to[0].word[0] = half && i == words - 1 ? *reinterpret_cast<const uint16_t*>(p + 4 * i)
                                             : *reinterpret_cast<const uint32_t*>(p + 4 * i);
    }
  }
  PEFTKERN_DEVICE void store_a(const Vec16 (&from)[kChunks][2], int buffer) const {
    unsigned char* const to =
        terms + buffer * 3 * kTermBytes + t % 8 / 4 * (kMaxMadeRank * 64) + rank * 64 + t % 4 * 16;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (rank + i * kRankStep >= 8 * groups) continue;
      Vec16 value[3] = {};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        uint32_t word[3] = {from[i][0].word[e]};
        if (wide) {
          split<3>(as_float(from[i][e / 2].word[e % 2 * 2]), as_float(from[i][e / 2].word[e % 2 * 2 + 1]),
                   word);
        } else if (kSplitsX) {
          uint32_t both[2];
          split_f16(word[0], both);
          word[0] = both[0];
          word[1] = both[1];
        }
#pragma unroll
        for (int term = 0; term < 3; ++term) value[term].word[e] = word[term];
      }
#pragma unroll
      for (int term = 0; term < 3; ++term) {
        if (term < count)
          *reinterpret_cast<Vec16*>(to + term * kTermBytes + i * kRankStep * 64) = value[term];
      }
    }
  }

  // This lane's 8 columns of 32, from column `from` of the tile on, of its two rows; zeros outside the
  // matrix.
  PEFTKERN_DEVICE void load_x(Vec16 (&to)[2], int from) const {
    const int left = left_x - from;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      to[half] = {};
      if (x[half] == nullptr || left <= 0) continue;
      if (left >= 8) {
        to[half] = load_once(reinterpret_cast<const Vec16*>(x[half] + from));
      } else {
        Vec16 both[2] = {};
        load_tail(both, reinterpret_cast<const unsigned char*>(x[half] + from), (left + 1) / 2,
                  left % 2 != 0);
        to[half] = both[0];
      }
    }
  }

  // Dropout bits of this lane's columns of a tile: a byte for each row of each block of 32. The seed is read
  // again, or all that is made of it would be kept in registers between tiles.
  PEFTKERN_DEVICE uint32_t kept(int tile) const {
    const auto seed = static_cast<uint64_t>(*args.dropout.seed);
    uint32_t bits = 0;
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const int64_t group = int64_t{2 * tile + i / 2} * 4 + lane % 4;
      bits |= keep_bits(seed, row + i % 2 * 8, group, args.dropout.threshold) << 8 * i;
    }
    return bits;
  }
  PEFTKERN_DEVICE void drop(Vec16 (&of_x)[2], uint32_t bits) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t& word = of_x[i / 4].word[i % 4];
      if ((bits >> 2 * i & 1) == 0) word &= 0xffff0000u;
      if ((bits >> 2 * i & 2) == 0) word &= 0x0000ffffu;
    }
  }

  // Products with one term of lora_A over 32 columns.
  template <int Term>
  PEFTKERN_DEVICE void multiply_term(float (&sums)[kGroups][4], const uint32_t (&of_x)[2][2][4],
                                     const unsigned char* a) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (group >= groups) break;
      const int at = Term * kTermBytes + (group * 8 + lane / 4) * 64 + lane % 4 * 16;
      const Vec16 of_a = *reinterpret_cast<const Vec16*>(a + at);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint32_t right[2] = {of_a.word[2 * step], of_a.word[2 * step + 1]};
#pragma unroll
        for (int i = kSplitsX && Term < 2 ? 1 : 0; i >= 0; --i) {
          const uint32_t left[4] = {of_x[i][0][2 * step], of_x[i][1][2 * step], of_x[i][0][2 * step + 1],
                                    of_x[i][1][2 * step + 1]};
          mma_16x8x16<bf16>(sums[group], left, right);
        }
      }
    }
  }
  // sums += x A^T over 32 columns, the smallest products of terms first.
  PEFTKERN_DEVICE void multiply(float (&sums)[kGroups][4], const Vec16 (&mine)[2],
                                const unsigned char* a) const {
    uint32_t of_x[2][2][4];  // term, row, word
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t both[2] = {mine[half].word[i], 0};
        if (kSplitsX) split_f16(mine[half].word[i], both);
        of_x[0][half][i] = both[0];
        of_x[1][half][i] = both[1];
      }
    }
    if (count == 3) multiply_term<2>(sums, of_x, a);
    if (count >= 2) multiply_term<1>(sums, of_x, a);
    multiply_term<0>(sums, of_x, a);
  }

  // The rows of v; every warp of the three has 16 of x.
  PEFTKERN_DEVICE void run() {
    const int tiles = static_cast<int>((args.K + kDepth - 1) / kDepth);
    float total[kGroups][4] = {}, sums[kGroups][4] = {};
    Vec16 of_a[kChunks][2], ahead[kAhead][2];
    load_a(of_a);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_x(ahead[i], 32 * i);
    store_a(of_a, 0);
    barrier_sync<kAdapterBarrier>(kAdapterThreads);
#pragma unroll 1
    for (int first = 0; first < tiles; first += 2) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int tile = first + odd;
        if (tile >= tiles) break;
        load_a(of_a);
        const uint32_t bits = args.dropout.seed != nullptr ? kept(tile) : 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          Vec16(&mine)[2] = ahead[2 * odd + i];
          if (args.dropout.seed != nullptr) drop(mine, bits >> 16 * i);
          multiply(sums, mine, terms + odd * 3 * kTermBytes + i * kMaxMadeRank * 64);
          load_x(mine, 32 * (i + kAhead));
        }
        if (x[0] != nullptr) x[0] += kDepth;
        if (x[1] != nullptr) x[1] += kDepth;
        left_x -= kDepth;
        if ((tile + 1) % (kBlockDepth / kDepth) == 0 || tile + 1 == tiles) {
#pragma unroll
          for (int i = 0; i < 4 * kGroups; ++i) {
            total[i / 4][i % 4] += sums[i / 4][i % 4];
            sums[i / 4][i % 4] = 0;
          }
        }
        store_a(of_a, 1 - odd);
        barrier_sync<kAdapterBarrier>(kAdapterThreads);
      }
    }
    const float factor = args.dropout.seed != nullptr ? args.dropout.keep_scale : 1.0f;
#pragma unroll
    for (int i = 0; i < 4 * kGroups; ++i) {
      const int64_t r = i / 4 * 8 + lane % 4 * 2 + i % 2, mine = row + i / 2 % 2 * 8;
      if (r < args.R && mine < args.M)
        store_published(args.v + mine * args.R + r, factor * total[i / 4][i % 4]);
    }
  }
};

// Blocks of rows of v. A block of the grid waits for rows only when their ticket is taken, so by a block that
// runs and, until they are done, waits for nobody: all waits end, however few blocks run at the same time.
//
// counters: tickets taken, blocks of the grid that are done, then, of each block of rows, whether it is done.
template <class T>
struct RowBlocks {
  static constexpr uint32_t kNone = ~0u;
  const LoraLinearArgs& args;
  unsigned char* terms;
  uint32_t* ticket;  // in shared memory
  int t;

  PEFTKERN_DEVICE uint32_t* done(int64_t block) const { return args.counters + 2 + block; }
  PEFTKERN_DEVICE int64_t count() const { return (args.M + kRowBlock - 1) / kRowBlock; }

  // The same in all three warps.
  PEFTKERN_DEVICE uint32_t broadcast(uint32_t value) const {
    if (t == 0) *ticket = value;
    barrier_sync<kAdapterBarrier>(kAdapterThreads);
    const uint32_t got = *ticket;
    barrier_sync<kAdapterBarrier>(kAdapterThreads);
    return got;
  }

  PEFTKERN_DEVICE void make(int64_t block) const {
    Shrink<T>(args, terms, t, block * kRowBlock).run();
    barrier_sync<kAdapterBarrier>(kAdapterThreads);
    if (t == 0) {
      fence_device();
      atomic_add(done(block), 1);
    }
  }
  // The rows of v that a tile wants, made by whomever; here are made those that nobody has taken yet, and,
  // with `first`, some in any case.
  PEFTKERN_DEVICE void wait_for(const Tile& tile, bool first) const {
    const int64_t end = tile.row + kRows < args.M ? tile.row + kRows : args.M;
    // A tile below the matrix wants none.
    const int64_t low = tile.row / kRowBlock, high = tile.row < args.M ? (end - 1) / kRowBlock : -1;
    while (true) {
      uint32_t taken = kNone;
      if (t == 0 && (first || static_cast<int64_t>(load_published(args.counters)) <= high))
        taken = atomic_add(args.counters, 1);
      first = false;
      taken = broadcast(taken);
      if (taken == kNone) break;
      if (taken < count()) make(taken);
    }
    if (low + t <= high) wait_at_least(done(low + t), 1);
    barrier_sync<kAdapterBarrier>(kAdapterThreads);
  }
  // The last block makes the counters ready for the next launch: nobody waits any more.
  PEFTKERN_DEVICE void leave() const {
    const bool last = broadcast(t == 0 ? atomic_count(args.counters + 1, gridDim.x) : 0) == gridDim.x - 1;
    if (!last) return;
    if (t == 0) *args.counters = 0;
    for (int64_t i = t; i < count(); i += kAdapterThreads) *done(i) = 0;
  }
};

}  // namespace peftkern::cuda::hopper
