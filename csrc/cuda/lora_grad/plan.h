// How one pass over `in` (M, C) is cut: column strips, row ranges and rank chunks, a block for each triple,
// and where each block's sums go.
#pragma once

#include "cuda/common/waves.h"
#include "cuda/instructions/device.h"
#include "peftkern/cuda.h"

namespace peftkern::cuda {

constexpr int kGradThreads = 256;
constexpr int kGradColumns = 256;  // of a strip; four groups of warps take 64 each
constexpr int kGradRows = 32;      // of a stage in shared memory
constexpr int kGradStages = 4;
constexpr int kGradFold = 4;  // stages after which a running product is added to the total
constexpr int kGradRowBytes = 2 * kGradColumns + 16;  // the pad spreads rows over the banks

struct GradPlan {
  bool grad, down, colsum;
  int ranks;  // of a block: 16, or 32 if there are more
  int64_t chunks, strips, ranges, range_rows;
  int64_t grad_at, down_at, colsum_at;  // in `partial`, -1: written where it belongs at once
  bool by_rank;                         // neighbours in grad's partial sums are ranks, as they are in grad
  int64_t floats;                       // of `partial`
};

inline GradPlan grad_plan(const LoraGradArgs& args) {
  GradPlan plan{};
  plan.grad = args.v != nullptr && args.R > 0 && args.C > 0;
  plan.down = args.p.data != nullptr && args.R > 0 && args.M > 0;
  plan.colsum = args.colsum != nullptr && args.C > 0;
  const bool products = plan.grad || plan.down;
  plan.ranks = products && args.R > 16 ? 32 : 16;
  plan.chunks = products ? (args.R + plan.ranks - 1) / plan.ranks : 1;
  plan.strips = (args.C + kGradColumns - 1) / kGradColumns;
  // The operand of `down` costs so many registers that a multiprocessor holds one block, not two.
  constexpr int64_t kShortest = 6 * kGradRows;
  const int64_t wanted = ranges_that_fill(plan.strips * plan.chunks, (args.M + kShortest - 1) / kShortest,
                                          plan.down ? 132 : 264);
  plan.range_rows = ((args.M + wanted - 1) / wanted + kGradRows - 1) / kGradRows * kGradRows;
  plan.ranges = args.M == 0 ? 0 : (args.M + plan.range_rows - 1) / plan.range_rows;
  plan.by_rank = args.grad.row < args.grad.col;
  plan.grad_at = plan.down_at = plan.colsum_at = -1;
  const auto take = [&plan](int64_t& at, bool wanted, int64_t parts, int64_t elements) {
    if (!wanted || parts == 1) return;
    at = plan.floats;
    plan.floats += parts * elements;
  };
  take(plan.grad_at, plan.grad, plan.ranges, args.R * args.C);
  take(plan.down_at, plan.down, plan.strips, args.M * args.R);
  take(plan.colsum_at, plan.colsum, plan.ranges, args.C);
  return plan;
}

}  // namespace peftkern::cuda
