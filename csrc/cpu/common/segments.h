// What the launchers add to their arguments before a level's code runs: for sums over rows, parts and
// scratch; for row norms, the adapters as panels.
#pragma once

#include "peftkern/cpu.h"

namespace peftkern::cpu {

// Floats from a row of sums to the next, of a panel of columns that a thread sums alone.
constexpr int64_t kSumLd = 272;
// Rows are summed in `segments` equal parts, each into its own part of scratch (segment_floats apart), then
// combined.
struct LoraReduceTask : LoraReduceArgs {
  int64_t segments = 1;
  int64_t segment_floats = 0;
  int64_t ld = 0;  // of the rows of sums
  float* scratch = nullptr;
};
struct ColumnDotTask : ColumnDotArgs {
  int64_t segments = 1;
  float* scratch = nullptr;
};
// v: b, and p: a, in fp32 with adjacent columns; rows of p end in zeros up to whole vectors.
struct LoraRowNormTask : LoraRowNormArgs {
  const float* v = nullptr;
  int64_t ldv = 0;
  const float* p = nullptr;
  int64_t ldp = 0;
};

}  // namespace peftkern::cpu
