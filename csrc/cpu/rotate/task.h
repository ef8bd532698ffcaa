// What the launchers of csrc/cpu/rotate add to their arguments before a level's code runs.
#pragma once

#include "peftkern/cpu.h"
#include "peftkern/cpu_series.h"

namespace peftkern::cpu {

// panels: r in fp32, rows of `ld` floats that end in zeros; block g at g * panel_block.
struct BlockRotateTask : BlockRotateArgs {
  const float* panels = nullptr;
  int64_t ld = 0;
  int64_t panel_block = 0;
};
// Rows are summed in `segments` parts, each into its own (blocks * size x ld) floats of scratch.
struct BlockRotateGradTask : BlockRotateGradArgs {
  int64_t segments = 1;
  float* scratch = nullptr;
  int64_t ld = 0;
};

// Matrices of `ld` floats a row in scratch, `thread_floats` for each thread.
struct SkewSeriesTask : SkewSeriesArgs {
  int64_t ld = 0;
  float* scratch = nullptr;
  int64_t thread_floats = 0;
};

}  // namespace peftkern::cpu
