// The low-rank term as operands of the tensor cores, and dropout bits: what the adapter's warpgroup makes.
#pragma once

#include "cuda/common/philox.h"
#include "cuda/common/split.h"
#include "cuda/instructions/memory.h"
#include "cuda/instructions/sync.h"
#include "cuda/lora_linear/sm90_plan.h"

namespace peftkern::cuda::hopper {

// Count elements of row i of a matrix of T from column j on; zeros from the column `limit` on.
template <class T, int Count>
PEFTKERN_DEVICE void load_row(float (&to)[Count], const ConstMatrix& m, int64_t i, int j, int limit) {
  constexpr int kEach = 16 / static_cast<int>(sizeof(T));
  const T* p = static_cast<const T*>(m.data) + i * m.row + j * m.col;
  if (m.col == 1 && j + Count <= limit && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
#pragma unroll
    for (int v = 0; v < Count / kEach; ++v) {
      union {
        Vec16 all;
        T each[kEach];
      };
      all = reinterpret_cast<const Vec16*>(p)[v];
#pragma unroll
      for (int e = 0; e < kEach; ++e) to[v * kEach + e] = to_float(each[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < Count; ++e) to[e] = j + e < limit ? to_float(p[e * m.col]) : 0.0f;
  }
}

// 16 ranks of one row of v, scaled; zeros beyond R. v may come from other blocks of this launch.
PEFTKERN_DEVICE void load_v(float (&to)[kRankGroup], const LoraLinearArgs& args, int64_t row, int first) {
  const float* p = args.v + row * args.R + first;
  const int left = static_cast<int>(args.R) - first;
  if (left >= kRankGroup && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
#pragma unroll
    for (int v = 0; v < kRankGroup / 4; ++v) {
      union {
        Vec16 all;
        float each[4];
      };
      all = load_published(reinterpret_cast<const Vec16*>(p) + v);
#pragma unroll
      for (int e = 0; e < 4; ++e) to[4 * v + e] = each[e];
    }
  } else {
#pragma unroll
    for (int e = 0; e < kRankGroup; ++e) to[e] = e < left ? load_published(p + e) : 0.0f;
  }
  const bool keeps = args.dropout.seed != nullptr && args.a.data == nullptr;
  const float factor = keeps ? args.scaling * args.dropout.keep_scale : args.scaling;
#pragma unroll
  for (int e = 0; e < kRankGroup; ++e) {
    to[e] *= factor;
    if (args.scales.d != nullptr && e < left) to[e] *= args.scales.d[first + e];
  }
}

// The same of one column of the tile: a row of b.
template <class T>
PEFTKERN_DEVICE void load_b(float (&to)[kRankGroup], const LoraLinearArgs& args, int64_t column, int first) {
  const int limit = static_cast<int>(args.R);
  if (args.b.dtype == DType::f32) {
    load_row<float>(to, args.b, column, first, limit);
  } else {
    load_row<T>(to, args.b, column, first, limit);
  }
  if (args.scales.g_d == nullptr) return;
  const float scale = args.scales.g_d[column];
#pragma unroll
  for (int e = 0; e < kRankGroup; ++e) to[e] *= scale;
}

// 16 bf16 values, 16 * piece columns into a row of a swizzled tile.
PEFTKERN_DEVICE void store_piece(unsigned char* tile, int row, int piece, const uint32_t (&words)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Vec16 value;
#pragma unroll
    for (int e = 0; e < 4; ++e) value.word[e] = words[4 * half + e];
    *reinterpret_cast<Vec16*>(tile + row * 128 + ((2 * piece + half) ^ (row & 7)) * 16) = value;
  }
}

// Two terms of 16 ranks, side by side: high, low. Of lora_B the high one alone if it is exact.
PEFTKERN_DEVICE void store_terms(unsigned char* tile, int row, int group, const float (&values)[kRankGroup],
                                 bool one_term) {
  uint32_t high[8], low[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t both[2];
    split<2>(values[2 * i], values[2 * i + 1], both);
    high[i] = both[0];
    low[i] = both[1];
  }
  store_piece(tile, row, 2 * group, high);
  if (!one_term) store_piece(tile, row, 2 * group + 1, low);
}

// One stage of the low-rank term of a tile, ranks from `first` on. A thread's share comes in units, 16 ranks
// of a row of the left operand or, behind its rows, of the right one. Two units are read while those before
// are stored; the first are read before the slot is waited for.
template <class T, int Columns, bool MakesV>
PEFTKERN_DEVICE void make_rank_stage(const LoraLinearArgs& args, const Layout<Columns, MakesV>& shared,
                                     uint32_t slot, uint32_t parity, Tile tile, int first, int t) {
  constexpr int kOperandRows = kRows + Columns;
  const bool single = one_term(args);
  const int groups = args.R - first > kRankGroup ? 2 : 1;
  const int units = (kOperandRows - t + kAdapterThreads - 1) / kAdapterThreads * groups;
  unsigned char* const operands = shared.memory + slot * shared.kStage;
  float now[2][kRankGroup], next[2][kRankGroup];
#pragma unroll 1
  for (int unit = 0; unit < units + 2; unit += 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = (unit + i) / groups * kAdapterThreads + t, group = (unit + i) % groups;
      const int row = tile.row + at, column = tile.column + at - kRows, rank = first + group * kRankGroup;
#pragma unroll
      for (int e = 0; e < kRankGroup; ++e) next[i][e] = 0;
      if (unit + i >= units) continue;
      if (at < kRows) {
        if (row < args.M) load_v(next[i], args, row, rank);
      } else if (column < args.N) {
        load_b<T>(next[i], args, column, rank);
      }
    }
    if (unit == 2) mbarrier_wait(shared.granted(slot), parity);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int before = unit - 2 + i, at = before / groups * kAdapterThreads + t;
      if (unit > 0 && before < units) {
        // The right operand lies kRows rows behind the left one's first.
        store_terms(operands, at, before % groups, now[i], single && at >= kRows);
      }
#pragma unroll
      for (int e = 0; e < kRankGroup; ++e) now[i][e] = next[i][e];
    }
  }
  fence_async_proxy();
  barrier_sync<kAdapterBarrier>(kAdapterThreads);
  if (t == 0) mbarrier_arrive(shared.full(slot));
}

// Dropout bits of a tile: a byte for 8 columns, row after row.
template <int Columns>
PEFTKERN_DEVICE void make_mask(const LoraLinearArgs& args, unsigned char* mask, Tile tile, uint64_t seed,
                               int t) {
  constexpr int kWords = Columns / 32;  // of a row
#pragma unroll 1
  for (int at = t; at < kRows * kWords; at += kAdapterThreads) {
    const auto row = static_cast<uint32_t>(tile.row + at / kWords),
               group = static_cast<uint32_t>(tile.column / 8 + at % kWords * 4);
    uint32_t bits = 0;
#pragma unroll
    for (uint32_t byte = 0; byte < 4; ++byte)
      bits |= keep_bits(seed, row, group + byte, args.dropout.threshold) << 8 * byte;
    reinterpret_cast<uint32_t*>(mask)[at] = bits;
  }
}

}  // namespace peftkern::cuda::hopper
