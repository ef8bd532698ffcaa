// Sums over `in` become results: scales, rounding, and where several blocks have a share, their sum in order.
#pragma once

#include "cuda/instructions/convert.h"
#include "cuda/instructions/sync.h"
#include "cuda/lora_grad/plan.h"

namespace peftkern::cuda {

PEFTKERN_DEVICE void finish_grad(const LoraGradArgs& args, int64_t r, int64_t c, float sum) {
  sum *= args.dropout.seed != nullptr ? args.alpha * args.dropout.keep_scale : args.alpha;
  if (args.column_scale != nullptr) sum *= args.column_scale[c];
  const int64_t at = r * args.grad.row + c * args.grad.col;
  switch (args.grad.dtype) {
    case DType::f32:
      static_cast<float*>(args.grad.data)[at] = sum;
      break;
    case DType::bf16:
      static_cast<bf16*>(args.grad.data)[at] = from_float<bf16>(sum);
      break;
    case DType::f16:
      static_cast<f16*>(args.grad.data)[at] = from_float<f16>(sum);
      break;
  }
}

PEFTKERN_DEVICE void finish_down(const LoraGradArgs& args, int64_t i, int64_t r, float sum) {
  args.down[i * args.R + r] =
      sum * (args.down_scale != nullptr ? args.down_alpha * args.down_scale[r] : args.down_alpha);
}

// Element `at` of parts that lie `stride` apart; several loads are under way at a time.
PEFTKERN_DEVICE float add_parts(const float* parts, int64_t at, int64_t stride, int64_t count) {
  float sum = 0;
#pragma unroll 8
  for (int64_t part = 0; part < count; ++part) sum += parts[part * stride + at];
  return sum;
}

// Blocks that each result takes: 0 where its sums are complete.
struct FinishBlocks {
  int64_t grad, down, colsum;
};
constexpr int kFinishThreads = 256;

inline FinishBlocks finish_blocks(const LoraGradArgs& args, const GradPlan& plan) {
  const auto blocks = [](int64_t at, int64_t elements) {
    return at < 0 ? 0 : (elements + kFinishThreads - 1) / kFinishThreads;
  };
  return {blocks(plan.grad_at, args.R * args.C), blocks(plan.down_at, args.M * args.R),
          blocks(plan.colsum_at, args.C)};
}

__global__ void __launch_bounds__(kFinishThreads)
    lora_grad_finish_kernel(const LoraGradArgs args, const GradPlan plan, const FinishBlocks blocks) {
  grid_wait();
  int64_t block = blockIdx.x;
  if (block < blocks.grad) {
    const int64_t at = block * kFinishThreads + threadIdx.x, size = args.R * args.C;
    if (at >= size) return;
    const float sum = add_parts(args.partial + plan.grad_at, at, size, plan.ranges);
    const int64_t inner = plan.by_rank ? args.R : args.C, outer = at / inner, rest = at % inner;
    finish_grad(args, plan.by_rank ? rest : outer, plan.by_rank ? outer : rest, sum);
    return;
  }
  block -= blocks.grad;
  if (block < blocks.down) {
    const int64_t at = block * kFinishThreads + threadIdx.x, size = args.M * args.R;
    if (at >= size) return;
    finish_down(args, at / args.R, at % args.R,
                add_parts(args.partial + plan.down_at, at, size, plan.strips));
    return;
  }
  const int64_t c = (block - blocks.down) * kFinishThreads + threadIdx.x;
  if (c < args.C) args.colsum[c] = add_parts(args.partial + plan.colsum_at, c, args.C, plan.ranges);
}

}  // namespace peftkern::cuda
