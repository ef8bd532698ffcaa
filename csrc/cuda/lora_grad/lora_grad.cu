// The adapters' gradients from one pass over a tall matrix: dA from x, or dB, du and dbias from dy.
//
//   grad = (s v)^T drop(in)      down = in p^T      colsum = 1^T in
//
// `in` is read once. Blocks own tiles of (rows, columns); grad is a sum over rows and down one over columns,
// so each block writes its share and a second launch adds the shares up, in order. The pass moves 2 M C bytes
// and 8 R (C ranges + M strips) for shares, most of which stay in L2.
#include "cuda/instructions/launch.h"
#include "cuda/lora_grad/pass.h"

namespace peftkern::cuda {
namespace {

template <class T, int Terms, int DownTerms>
const char* start_pass(const LoraGradArgs& args, const GradPlan& plan) {
  const int64_t blocks = plan.chunks * plan.strips * plan.ranges;
  if (blocks > 0x7fffffff) return "cudaErrorInvalidConfiguration";
  const Launch how{
      {static_cast<unsigned>(blocks)}, {kGradThreads}, grad_shared_bytes(plan, Terms), args.stream};
  return launch(how, lora_grad_kernel<T, Terms, DownTerms>, args, plan);
}

// Of v and of an adapter that a scale has made fp32: three terms where sums are kept in fp32, two where an
// adapter in half precision rounds them anyway. An adapter in half precision enters as it is.
template <class T>
const char* start_pass(const LoraGradArgs& args, const GradPlan& plan) {
  const bool wide = plan.grad && args.grad.dtype == DType::f32;
  if (!plan.down) return wide ? start_pass<T, 3, 0>(args, plan) : start_pass<T, 2, 0>(args, plan);
  if (args.p.dtype == DType::f32 || args.column_scale != nullptr || wide)
    return start_pass<T, 3, 3>(args, plan);
  return start_pass<T, 2, 1>(args, plan);
}

const char* start(const LoraGradArgs& args) {
  const GradPlan plan = grad_plan(args);
  if (!plan.grad && !plan.down && !plan.colsum) return nullptr;
  if (plan.strips > 0 && plan.ranges > 0) {
    const char* error = args.in.dtype == DType::bf16  ? start_pass<bf16>(args, plan)
                        : args.in.dtype == DType::f16 ? start_pass<f16>(args, plan)
                                                      : "cudaErrorInvalidValue";
    if (error != nullptr) return error;
  }
  const FinishBlocks blocks = finish_blocks(args, plan);
  const int64_t count = blocks.grad + blocks.down + blocks.colsum;
  if (count == 0) return nullptr;
  if (count > 0x7fffffff) return "cudaErrorInvalidConfiguration";
  Launch how{{static_cast<unsigned>(count)}, {kFinishThreads}, 0, args.stream};
  how.dependent = args.dependent && plan.strips > 0 && plan.ranges > 0;
  return launch(how, lora_grad_finish_kernel, args, plan, blocks);
}

// Dropout is of grad alone: with it, the other parts are a pass of their own.
struct Passes {
  LoraGradArgs first, second;
  bool both;
};

Passes passes(const LoraGradArgs& args) {
  Passes p{args, args, false};
  if (args.dropout.seed == nullptr) return p;
  if (args.v == nullptr) {
    p.first.dropout = {};
    return p;
  }
  p.both = args.p.data != nullptr || args.colsum != nullptr;
  p.first.p.data = nullptr;
  p.first.colsum = nullptr;
  p.second.v = nullptr;
  p.second.dropout = {};
  return p;
}

}  // namespace

int64_t lora_grad_partials(const LoraGradArgs& args) {
  const Passes p = passes(args);
  const int64_t first = grad_plan(p.first).floats, second = p.both ? grad_plan(p.second).floats : 0;
  return first > second ? first : second;
}

const char* lora_grad(const LoraGradArgs& args) {
  const Passes p = passes(args);
  const char* error = start(p.first);
  return error != nullptr || !p.both ? error : start(p.second);
}

}  // namespace peftkern::cuda
