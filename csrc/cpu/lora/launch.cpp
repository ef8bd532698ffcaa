// Launchers: choice of the level, and scratch for the sums over rows.
#include "cpu/common/dispatch.h"
#include "cpu/common/kept_scratch.h"
#include "cpu/common/segments.h"

PEFTKERN_DISPATCH(dropout_mask, DropoutMaskArgs)
PEFTKERN_DISPATCH(lora_expand, LoraExpandArgs)
PEFTKERN_DISPATCH(scale_copy, ScaleCopyArgs)
PEFTKERN_DISPATCH_LOCAL(lora_reduce_run, LoraReduceTask)
PEFTKERN_DISPATCH_LOCAL(column_dot_run, ColumnDotTask)

namespace peftkern::cpu {
namespace {

constexpr int64_t kSegmentRows = 128;

}  // namespace

void lora_reduce(const LoraReduceArgs& args) {
  LoraReduceTask task{args};
  KeptScratch scratch;
  if (args.v != nullptr || args.colsum != nullptr) {
    task.segment_floats =
        ((args.v != nullptr ? args.R : 0) + (args.colsum != nullptr ? 1 : 0)) * padded(args.C);
    task.segments = part_count(args.M, kSegmentRows, task.segment_floats);
    task.scratch = scratch.take(task.segments * task.segment_floats);
  }
  lora_reduce_run(task);
}

void column_dot(const ColumnDotArgs& args) {
  ColumnDotTask task{args};
  task.segments = part_count(args.M, kSegmentRows, padded(args.C));
  KeptScratch scratch;
  task.scratch = scratch.take(task.segments * padded(args.C));
  column_dot_run(task);
}

}  // namespace peftkern::cpu
