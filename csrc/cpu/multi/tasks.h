// What the launchers of multi_lora_linear hand to a level's code: flat lists of pieces of work.
#pragma once

#include "peftkern/types.h"

namespace peftkern::cpu {

// Columns of a tile, and what a thread's scratch holds per rank.
constexpr int64_t kMultiTileCols = 256, kReduceFloatsPerRank = 848, kExpandFloatsPerRank = 528;
// Rows of a unit of expand, at most.
constexpr int64_t kExpandRows = 256;
// Rows of a unit of few rows, at most, and how many floats one takes as fp32. (static: files compiled per
// level share no inline code.)
constexpr int64_t kFewRows = 6;
[[maybe_unused]] static constexpr int64_t few_row(int64_t C) {
  return (C + 15) / 16 * 16 + 16;
}

// One adapter's rows, seen from one side (peftkern/cpu_multi.h).
struct MultiSegment {
  const int32_t* rows;
  int64_t count, R;
  ConstMatrix p;  // (R, C)
  bool padded;    // zeros follow the rows of p up to a multiple of kPadColumns
  float alpha;
  Dropout dropout;
  const float* row_scale;  // (R) or null; the rest (C) or null
  const float* col_scale;
  const float* base_scale;  // expand alone, as the bias
  const float* bias;
  bool own_bias;      // the bias is the adapter's: no part of colsum
  Matrix grad;        // like p; data null: not wanted
  float* col_grad;    // (C), of col_scale; null: not wanted
  int64_t part_rows;  // rows that are summed before they are added to other sums
};

// Rows [i0, i1) of a segment, columns [c0, c1), ranks [r0, r1). Columns start at multiples of a tile's.
struct MultiUnit {
  const MultiSegment* segment;
  int64_t i0, i1, c0, c1, r0, r1;
  bool dot = false, outer = false;
  int64_t sums = -1;    // outer: where in `sums` those over these rows are kept; -1: they are all there is
  int64_t colsum = -1;  // which row of `colsums` takes the sum of the first part's rows of `in`; -1: none
};

struct MultiReduceTask {
  const MultiUnit* units;
  int64_t count;
  const MultiUnit* finish;  // gradients that are sums of units' sums: (i1 - i0) of them, from `sums` on
  int64_t finish_count;
  float* sums;
  float* colsums;  // rows of C columns, padded
  int64_t colsum_count;
  float* colsum;  // (C) or null; the rows of colsums are added to it
  ConstMatrix in;
  int64_t C;
  float* dot;
  const float* v;
  int64_t ld;
  float* scratch;
  int64_t scratch_floats;  // per thread
  int threads;
};

struct MultiExpandTask {
  const MultiUnit* units;  // columns relative to the block
  int64_t count;
  Matrix out;
  ConstMatrix src;
  int64_t row0, col0;
  const float* v;
  int64_t ld;
  float* scratch;
  int64_t scratch_floats;
  int threads;
};

}  // namespace peftkern::cpu
