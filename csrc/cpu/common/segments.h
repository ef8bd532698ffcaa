// Sums over rows: what the launchers add to their arguments before a level's code runs.
#pragma once

#include "peftkern/cpu.h"

namespace peftkern::cpu {

// Rows are summed in `segments` equal parts, each into its own part of scratch (segment_floats apart), then
// combined.
struct LoraReduceTask : LoraReduceArgs {
  int64_t segments = 1;
  int64_t segment_floats = 0;
  float* scratch = nullptr;
};
struct ColumnDotTask : ColumnDotArgs {
  int64_t segments = 1;
  float* scratch = nullptr;
};

}  // namespace peftkern::cpu
