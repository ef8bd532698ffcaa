// Launchers: choice of the level, scratch for the sums over rows, panels for row norms.
#include "cpu/common/dispatch.h"
#include "cpu/common/kept_scratch.h"
#include "cpu/common/segments.h"
#include "cpu/lora/steps.h"

PEFTKERN_DISPATCH(drop_copy, DropCopyArgs)
PEFTKERN_DISPATCH(dropout_mask, DropoutMaskArgs)
PEFTKERN_DISPATCH(lora_expand, LoraExpandArgs)
PEFTKERN_DISPATCH(scale_copy, ScaleCopyArgs)
PEFTKERN_DISPATCH_LOCAL(lora_reduce_run, LoraReduceTask)
PEFTKERN_DISPATCH_LOCAL(column_dot_run, ColumnDotTask)
PEFTKERN_DISPATCH_LOCAL(lora_row_norm_run, LoraRowNormTask)

namespace peftkern::cpu {
namespace {

constexpr int64_t kSegmentRows = 128;

}  // namespace

void lora_reduce(const LoraReduceArgs& args) {
  LoraReduceTask task{args};
  KeptScratch scratch;
  if (args.v != nullptr || args.colsum != nullptr) {
    // As with the panel of a row norm, rows of sums must not share a few sets of a cache.
    task.ld = padded(args.C) + kPadColumns;
    task.segment_floats = ((args.v != nullptr ? args.R : 0) + (args.colsum != nullptr ? 1 : 0)) * task.ld;
    task.segments = part_count(args.M, kSegmentRows, task.segment_floats);
    // As many parts, or of a panel of columns two for each thread (reduce.cpp).
    const int64_t panels = 2 * args.threads * (task.segment_floats / task.ld) * kSumLd;
    task.scratch = scratch.take(std::max(task.segments * task.segment_floats, panels));
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

void lora_row_norm(const LoraRowNormArgs& args) {
  LoraRowNormTask task{args};
  KeptScratch scratch;
  const Panel v = as_panel(args.b, args.N, args.R, 1.0f, nullptr, nullptr, args.threads, scratch);
  // Rows of p a cache line further apart than they are long: with K a power of two they would share a few
  // sets of a cache, and each is read once for every kCombineRows rows of w.
  const int64_t pad = padded(args.K) - args.K, ldp = padded(args.K) + kPadColumns;
  float* p = scratch.take(args.R * ldp);
  scale_copy({args.a,
              {p, DType::f32, ldp, 1},
              args.R,
              args.K,
              pad,
              1.0f,
              nullptr,
              nullptr,
              worth_threads(4 * args.R * args.K, args.threads)});
  task.v = v.data, task.ldv = v.ld, task.p = p, task.ldp = ldp;
  task.threads = worth_threads(args.N * args.K * std::max<int64_t>(args.R, 1), args.threads);
  lora_row_norm_run(task);
}

}  // namespace peftkern::cpu
