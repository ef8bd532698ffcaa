// v = drop(x) lora_A^T within the launch, by three warps: 48 rows of it.
//
// Its transpose is what is multiplied: ranks are the 16 rows of a product, rows of x its 8 columns. Within 32
// columns of x a lane takes 8 that are adjacent, 16 bytes, for two products, and lora_A follows the same
// order, so the sums are the same. What a lane needs it copies for itself, tiles ahead; the terms of lora_A
// alone are shared by the warps, as operands ready to be read.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/instructions/copy_async.h"
#include "cuda/instructions/mma.h"
#include "cuda/instructions/warp.h"
#include "cuda/lora_linear/sm90_rank.h"

namespace peftkern::cuda::hopper {

constexpr int kBlockDepth = 256;  // columns of x that go into one fresh sum

PEFTKERN_DEVICE float as_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// T is x's type. lora_A enters as bf16 terms: three if it is fp32, two if it is fp16 (exact, as are the two
// of an fp16 x), one if it is bf16. Groups: of 16 ranks.
template <class T, int Groups>
struct Shrink {
  static constexpr bool kSplitsX = std::is_same_v<T, f16>;
  static constexpr int kSets = Groups == 1 ? 2 : 1;  // of sums, so that products wait less for each other
  static constexpr int kBuffers = kSets, kAhead = kSets;  // of terms; tiles of x
  static constexpr int kOperands = 4 * Groups, kOperand = 512, kTermBytes = kOperands * kOperand;
  static constexpr int kWarps = kAdapterThreads / 32;
  // Shared memory: in each buffer three terms of a tile of lora_A, operands for each 16 columns and group;
  // what lanes copy of lora_A; what they copy of x.
  static constexpr int kRawA = 3 * kBuffers * kTermBytes, kRawX = kRawA + 2 * kOperands * kOperand;
  static constexpr int kBytes = kRawX + kAhead * 4 * kAdapterThreads * 16;
  static_assert(kBytes <= static_cast<int>(kShrinkBytes));

  struct Sums {
    float of[Groups][2][4];  // of two blocks of 8 rows of x
  };

  const LoraLinearArgs& args;
  unsigned char* memory;
  int t, warp, lane, count;
  int row;                 // of this lane's first row of x; the other is 8 below
  const T* x[2];           // the rows, from this lane's columns of the tile to be copied next on
  const unsigned char* a;  // row lane / 4 of lora_A, the same
  int64_t row_a;           // bytes from there to its next row
  int left_x, left_a;      // columns from there to the end
  int ranks;               // rows of lora_A from there to the end
  bool wide;               // lora_A is fp32

  PEFTKERN_DEVICE Shrink(const LoraLinearArgs& args, unsigned char* memory, int t, int first)
      : args(args), memory(memory), t(t), warp(t / 32), lane(t % 32), row(first + t / 32 * 16 + t % 32 / 4) {
    wide = args.a.dtype == DType::f32;
    count = wide ? 3 : kSplitsX ? 2 : 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int mine = row + 8 * half;
      x[half] = mine < args.M ? static_cast<const T*>(args.x.data) + int64_t{mine} * args.x.row + lane % 4 * 8
                              : nullptr;
    }
    row_a = args.a.row * (wide ? 4 : 2);
    a = static_cast<const unsigned char*>(args.a.data) + lane / 4 * row_a + lane % 4 * (wide ? 32 : 16);
    ranks = static_cast<int>(args.R) - lane / 4;
    left_x = left_a = static_cast<int>(args.K) - lane % 4 * 8;
  }

  // What this lane keeps of operand `operand`, rows `half` * 8 below its first; of two rows of x.
  PEFTKERN_DEVICE unsigned char* raw_a(int operand, int half) const {
    return memory + kRawA + (2 * operand + half) * kOperand + lane * 16;
  }
  PEFTKERN_DEVICE unsigned char* raw_x(int tile, int block, int half) const {
    return memory + kRawX + ((tile % kAhead * 4 + 2 * block + half) * kAdapterThreads + t) * 16;
  }

  // Start to copy the next tile: of lora_A 4 columns of two rows for each operand that falls to this warp, of
  // x 8 columns of each block of 32 of two rows. Zeros outside the matrix.
  PEFTKERN_DEVICE void copy_a() {
    const int size = wide ? 4 : 2;
    // Unrolled, its addresses would be kept in registers for ever.
#pragma unroll 1
    for (int operand = warp; operand < kOperands; operand += kWarps) {
      const int step = operand / Groups, up = operand % Groups * 16, from = step / 2 * 32 + step % 2 * 4;
      const unsigned char* p = a + up * row_a + from * size;
      const int left = left_a - from, inside = (left < 0 ? 0 : left < 4 ? left : 4) * size;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int valid = up + 8 * half < ranks ? inside : 0;
        const void* from_a = valid > 0 ? p + 8 * half * row_a : args.a.data;
        if (wide) {
          copy_async<16>(shared_address(raw_a(operand, half)), from_a, valid);
        } else {
          copy_async<8>(shared_address(raw_a(operand, half)), from_a, valid);
        }
      }
    }
    copy_commit();
    a += kDepth * size;
    left_a -= kDepth;
  }
  PEFTKERN_DEVICE void copy_x(int tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        const int left = x[half] != nullptr ? left_x - 32 * block : 0;
        const int valid = (left < 0 ? 0 : left < 8 ? left : 8) * 2;
        const void* p = valid > 0 ? x[half] + 32 * block : args.x.data;
        copy_async<16>(shared_address(raw_x(tile, block, half)), p, valid);
      }
      if (x[half] != nullptr) x[half] += kDepth;
    }
    copy_commit();
    left_x -= kDepth;
  }

  // Makes operands of what copy_a brought.
  PEFTKERN_DEVICE void make_operands(unsigned char* terms) const {
#pragma unroll 1
    for (int operand = warp; operand < kOperands; operand += kWarps) {
      const Vec16 from[2] = {*reinterpret_cast<const Vec16*>(raw_a(operand, 0)),
                             *reinterpret_cast<const Vec16*>(raw_a(operand, 1))};
      Vec16 value[3];
      if (wide) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          uint32_t word[3];
          const uint32_t* pair = from[e % 2].word + e / 2 * 2;
          split<3>(as_float(pair[0]), as_float(pair[1]), word);
#pragma unroll
          for (int term = 0; term < 3; ++term) value[term].word[e] = word[term];
        }
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          uint32_t both[2] = {from[e % 2].word[e / 2], 0};
          if (kSplitsX) split_f16(both[0], both);
          value[0].word[e] = both[0];
          value[1].word[e] = both[1];
        }
      }
      unsigned char* const to = terms + operand * kOperand + lane * 16;
#pragma unroll
      for (int term = 0; term < 3; ++term) {
        if (term < count) *reinterpret_cast<Vec16*>(to + term * kTermBytes) = value[term];
      }
    }
  }

  // Dropout bits of this lane's columns of a tile: a byte for each row of each block of 32. The seed is read
  // again, or all that is made of it would be kept in registers between tiles.
  PEFTKERN_DEVICE uint32_t kept(int tile) const {
    const auto seed = static_cast<uint64_t>(*args.dropout.seed);
    uint32_t bits = 0;
#pragma unroll 2
    for (int i = 0; i < 4; ++i) {
      const auto mine = static_cast<uint32_t>(row + i % 2 * 8),
                 group = static_cast<uint32_t>((2 * tile + i / 2) * 4 + lane % 4);
      bits |= keep_bits(seed, mine, group, args.dropout.threshold) << 8 * i;
    }
    return bits;
  }
  PEFTKERN_DEVICE void drop(Vec16 (&of_x)[2][2], uint32_t bits) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      uint32_t& word = of_x[i / 8][i / 4 % 2].word[i % 4];
      if ((bits >> 2 * i & 1) == 0) word &= 0xffff0000u;
      if ((bits >> 2 * i & 2) == 0) word &= 0x0000ffffu;
    }
  }

  // Products of one term of lora_A and term I of x over a tile.
  template <int TermsX, int I>
  PEFTKERN_DEVICE void multiply_terms(Sums (&sums)[kSets], const uint32_t (&of_x)[TermsX][2][2][4],
                                      const unsigned char* a) const {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int group = 0; group < Groups; ++group) {
        const Vec16 of_a =
            *reinterpret_cast<const Vec16*>(a + (step * Groups + group) * kOperand + lane * 16);
        const uint32_t left[4] = {of_a.word[0], of_a.word[1], of_a.word[2], of_a.word[3]};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t (&words)[4] = of_x[I][step / 2][half];
          const uint32_t right[2] = {words[step % 2 * 2], words[step % 2 * 2 + 1]};
          mma_16x8x16<bf16>(sums[step / 2 % kSets].of[group][half], left, right);
        }
      }
    }
  }
  // sums += A x^T over a tile, the smallest products of terms first.
  PEFTKERN_DEVICE void multiply(Sums (&sums)[kSets], const Vec16 (&mine)[2][2],
                                const unsigned char* a) const {
    constexpr int kTermsX = kSplitsX ? 2 : 1;
    uint32_t of_x[kTermsX][2][2][4];  // term, block of 32 columns, row, word
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t word = mine[i / 8][i / 4 % 2].word[i % 4];
      if constexpr (kSplitsX) {
        uint32_t both[2];
        split_f16(word, both);
        of_x[0][i / 8][i / 4 % 2][i % 4] = both[0];
        of_x[1][i / 8][i / 4 % 2][i % 4] = both[1];
      } else {
        of_x[0][i / 8][i / 4 % 2][i % 4] = word;
      }
    }
    if (count == 3) multiply_terms<kTermsX, 0>(sums, of_x, a + 2 * kTermBytes);
    if (count >= 2) {
      if constexpr (kSplitsX) multiply_terms<kTermsX, 1>(sums, of_x, a + kTermBytes);
      multiply_terms<kTermsX, 0>(sums, of_x, a + kTermBytes);
    }
    if constexpr (kSplitsX) multiply_terms<kTermsX, 1>(sums, of_x, a);
    multiply_terms<kTermsX, 0>(sums, of_x, a);
  }

  // The rows of v; every warp of the three has 16 of x.
  PEFTKERN_DEVICE void run() {
    const int tiles = static_cast<int>((args.K + kDepth - 1) / kDepth);
    Sums total{}, sums[kSets]{};
    copy_a();
    for (int tile = 0; tile < kAhead; ++tile) copy_x(tile);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      unsigned char* const terms = memory + tile % kBuffers * 3 * kTermBytes;
      copy_wait<kAhead - 1>();
      if (kBuffers == 1) barrier_sync<kAdapterBarrier>(kAdapterThreads);  // the tile before has been read
      make_operands(terms);
      Vec16 mine[2][2];  // columns of each block of 32, of each row
#pragma unroll
      for (int i = 0; i < 4; ++i)
        mine[i / 2][i % 2] = *reinterpret_cast<const Vec16*>(raw_x(tile, i / 2, i % 2));
      copy_a();
      copy_x(tile + kAhead);
      barrier_sync<kAdapterBarrier>(kAdapterThreads);
      if (args.dropout.seed != nullptr) drop(mine, kept(tile));
      multiply(sums, mine, terms);
      if ((tile + 1) % (kBlockDepth / kDepth) != 0 && tile + 1 != tiles) continue;
#pragma unroll
      for (int i = 0; i < 8 * Groups; ++i) {
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
          total.of[i / 8][i / 4 % 2][i % 4] += sums[set].of[i / 8][i / 4 % 2][i % 4];
          sums[set].of[i / 8][i / 4 % 2][i % 4] = 0;
        }
      }
    }
    copy_wait<0>();
    barrier_sync<kAdapterBarrier>(kAdapterThreads);  // nobody reads the last tile any more
    const float factor = args.dropout.seed != nullptr ? args.dropout.keep_scale : 1.0f;
#pragma unroll
    for (int i = 0; i < 8 * Groups; ++i) {
      const int r = i / 8 * 16 + lane / 4 + i / 2 % 2 * 8;
      const int mine = row - lane / 4 + i / 4 % 2 * 8 + lane % 4 * 2 + i % 2;
      if (r < args.R && mine < args.M)
        store_published(args.v + int64_t{mine} * args.R + r, factor * total.of[i / 8][i / 4 % 2][i % 4]);
    }
  }
};

}  // namespace peftkern::cuda::hopper
