// Launchers: choice of the level, and scratch for the sums over rows.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/dispatch.h"
#include "cpu/segments.h"

PEFTKERN_DISPATCH(dropout_mask, DropoutMaskArgs)
PEFTKERN_DISPATCH(lora_expand, LoraExpandArgs)
PEFTKERN_DISPATCH(scale_copy, ScaleCopyArgs)
PEFTKERN_DISPATCH_LOCAL(lora_reduce_run, LoraReduceTask)
PEFTKERN_DISPATCH_LOCAL(column_dot_run, ColumnDotTask)

namespace peftkern::cpu {
namespace {

constexpr int64_t kSegmentRows = 128, kMaxSegments = 32, kMaxScratchFloats = int64_t{1} << 23;

// How many parts M rows are summed in, when each part needs `floats` of scratch: a function of sizes alone.
int64_t segment_count(int64_t M, int64_t floats) {
  const int64_t fit = kMaxScratchFloats / std::max<int64_t>(floats, 1);
  return std::clamp<int64_t>(std::min(M / kSegmentRows, fit), 1, kMaxSegments);
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};

std::unique_ptr<float, Free> allocate(int64_t floats) {
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
  float* p = static_cast<float*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64)));
  if (p == nullptr) throw std::bad_alloc();
  return std::unique_ptr<float, Free>(p);
}

int64_t padded(int64_t columns) {
  return (columns + kPadColumns - 1) / kPadColumns * kPadColumns;
}

}  // namespace

void lora_reduce(const LoraReduceArgs& args) {
  LoraReduceTask task{args};
  std::unique_ptr<float, Free> scratch;
  if (args.v != nullptr || args.colsum != nullptr) {
    task.segment_floats =
        ((args.v != nullptr ? args.R : 0) + (args.colsum != nullptr ? 1 : 0)) * padded(args.C);
    task.segments = segment_count(args.M, task.segment_floats);
    scratch = allocate(task.segments * task.segment_floats);
    task.scratch = scratch.get();
  }
  lora_reduce_run(task);
}

void column_dot(const ColumnDotArgs& args) {
  ColumnDotTask task{args};
  task.segments = segment_count(args.M, padded(args.C));
  const std::unique_ptr<float, Free> scratch = allocate(task.segments * padded(args.C));
  task.scratch = scratch.get();
  column_dot_run(task);
}

}  // namespace peftkern::cpu
