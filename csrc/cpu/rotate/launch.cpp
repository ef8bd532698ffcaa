// Launchers: choice of the level, panels, scratch for the sums over rows.
#include "cpu/common/dispatch.h"
#include "cpu/common/kept_scratch.h"
#include "cpu/common/views.h"
#include "cpu/rotate/task.h"

PEFTKERN_DISPATCH_LOCAL(block_rotate_run, BlockRotateTask)
PEFTKERN_DISPATCH_LOCAL(block_rotate_grad_run, BlockRotateGradTask)
PEFTKERN_DISPATCH_LOCAL(skew_series_run, SkewSeriesTask)

namespace peftkern::cpu {
namespace {

constexpr int64_t kSegmentRows = 240;

}  // namespace

void block_rotate(const BlockRotateArgs& args) {
  BlockRotateTask task{args};
  KeptScratch scratch;
  const int64_t b = args.size;
  if (args.r.dtype == DType::f32 && args.r.col == 1 && b % kPadColumns == 0 && args.r.row >= b) {
    task.panels = static_cast<const float*>(args.r.data), task.ld = args.r.row;
    task.panel_block = args.r_block;
  } else {
    const int64_t blocks = args.r_block == 0 ? 1 : args.blocks;
    task.ld = padded(b), task.panel_block = args.r_block == 0 ? 0 : b * task.ld;
    float* panels = scratch.take(blocks * b * task.ld);
    for (int64_t g = 0; g < blocks; ++g) {
      ConstMatrix r = args.r;
      r.data = static_cast<const char*>(r.data) + g * args.r_block * element_size(r.dtype);
      scale_copy({r,
                  {panels + g * b * task.ld, DType::f32, task.ld, 1},
                  b,
                  b,
                  task.ld - b,
                  1.0f,
                  nullptr,
                  nullptr,
                  1});
    }
    task.panels = panels;
  }
  task.threads = worth_threads(args.M * args.blocks * b * b, args.threads);
  block_rotate_run(task);
}

void block_rotate_grad(const BlockRotateGradArgs& args) {
  BlockRotateGradTask task{args};
  KeptScratch scratch;
  const int64_t b = args.size;
  task.ld = padded(b);
  const int64_t floats = args.blocks * b * task.ld;
  task.segments = part_count(args.M, kSegmentRows, floats);
  task.scratch = scratch.take(task.segments * floats);
  task.threads = worth_threads(args.M * args.blocks * b * b, args.threads);
  block_rotate_grad_run(task);
}

void skew_series(const SkewSeriesArgs& args) {
  SkewSeriesTask task{args};
  KeptScratch scratch;
  const int64_t b = args.size, matrices = 6 + args.pairs;
  task.ld = padded(b);
  task.threads = worth_threads(args.blocks * args.pairs * b * b * b, args.threads);
  task.threads = static_cast<int>(std::clamp<int64_t>(args.blocks, 1, task.threads));
  task.thread_floats = matrices * b * task.ld;
  task.scratch = scratch.take(task.threads * task.thread_floats);
  skew_series_run(task);
}

}  // namespace peftkern::cpu
