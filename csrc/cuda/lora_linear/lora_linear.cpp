// Forward: on sm_90 one launch makes the base product, u and the low-rank term; elsewhere, or for wide ranks,
// one launch makes u first, as over a weight in codes, which forward passes of few rows read. Backward: one
// pass over dy gives du, the gradient of lora_B and the bias gradient, one pass over x gives the gradient of
// lora_A, and the input gradient is the forward's kernel with W, A and B transposed.
#include "cuda/lora_linear/lora_linear.h"

#include <algorithm>

namespace peftkern::cuda {
namespace {

// Beyond, du's partial sums in the pass that makes dB cost more than a pass of its own over dy.
constexpr int64_t kFusedDownRank = 64;

constexpr const char* kNotTaken = "no kernel takes these sizes, dtypes or strides";

template <class M>
M transposed(const M& m) {
  return {m.data, m.dtype, m.col, m.row};
}

// w (rows, columns) as the product's kernels take it.
void set_weight(LoraLinearArgs& args, const ConstMatrix& w) {
  args.w_by_row = w.col != 1 && w.row == 1;
  args.w = args.w_by_row ? transposed(w) : w;
}

LoraLinearArgs product_of(const LoraPass& pass) {
  LoraLinearArgs args{};
  args.M = pass.M, args.R = pass.R;
  args.multiprocessors = pass.multiprocessors, args.stream = pass.stream;
  return args;
}

// With v made before.
const char* start_product(const LoraLinearArgs& args, int arch) {
  if (arch == 90 && lora_linear_sm90_takes(args)) return lora_linear_sm90(args);
  return lora_linear_sm80_takes(args) ? lora_linear_sm80(args) : kNotTaken;
}

// --- forward ---

LoraLinearArgs forward_product(const LoraForward& pass) {
  LoraLinearArgs args = product_of(pass);
  args.N = pass.N, args.K = pass.K;
  args.x = pass.x, args.out = pass.y, args.v = pass.u, args.b = pass.b;
  set_weight(args, pass.w);
  args.scaling = pass.scaling;
  args.scales = {pass.scales.d, nullptr, nullptr, pass.scales.g_b, pass.scales.g_d};
  args.bias = pass.bias, args.bias_dtype = pass.bias_dtype;
  return args;
}

// One launch that makes u as well.
LoraLinearArgs whole_forward(const LoraForward& pass) {
  LoraLinearArgs args = forward_product(pass);
  args.a = pass.a, args.dropout = pass.dropout, args.counters = pass.counters;
  return args;
}

bool takes_whole(const LoraForward& pass) {
  return pass.arch == 90 && pass.codes == nullptr && pass.scales.p_d == nullptr && pass.a.data != nullptr &&
         lora_linear_sm90_takes(whole_forward(pass));
}

LoraShrinkArgs forward_shrink(const LoraForward& pass) {
  return {pass.x, pass.a, pass.scales.p_d, nullptr, 1.0f,         pass.dropout,
          pass.M, pass.K, pass.R,          pass.u,  pass.scratch, pass.stream};
}

// --- backward ---

// What is launched: a pass over dy, one over x, a product. du lies in front in scratch, unless it goes out.
struct BackwardSteps {
  bool over_dy, shrinks, over_x;
  LoraGradArgs dy, x;
  LoraShrinkArgs shrink;
  LoraLinearArgs dx;
  int64_t du = 0, partial = 0;
};

BackwardSteps steps_of(const LoraBackward& pass) {
  BackwardSteps s{};
  const Scales<const float*>& at = pass.scales;
  const bool empty = pass.M == 0 || pass.N == 0, fused = pass.R <= kFusedDownRank;
  // 256 bytes, as torch's allocator aligns at least.
  constexpr int64_t kAlign = 64;
  if (pass.dv == nullptr) s.du = (pass.M * pass.R + kAlign - 1) / kAlign * kAlign;
  float* du = pass.dv != nullptr ? pass.dv : pass.scratch;
  float* partial = pass.scratch != nullptr ? pass.scratch + s.du : nullptr;
  // What goes out is before d, which then acts where du is read.
  const float *d_on_du = pass.dv != nullptr ? nullptr : at.d, *d_later = pass.dv != nullptr ? at.d : nullptr;

  LoraGradArgs& dy = s.dy;
  s.over_dy = (pass.need_B || pass.need_bias) && !empty;
  dy.in = pass.dy, dy.M = pass.M, dy.C = pass.N, dy.R = pass.R;
  dy.v = pass.need_B ? pass.u : nullptr, dy.v_scale = at.d, dy.alpha = pass.scaling;
  dy.column_scale = at.g_d, dy.grad = transposed(pass.dB);
  if (fused) dy.p = transposed(pass.b), dy.down = du;
  dy.down_scale = d_on_du, dy.down_alpha = pass.scaling;
  dy.colsum = pass.need_bias ? pass.dbias : nullptr;

  const bool made = (pass.need_B || pass.need_bias) && fused;
  s.shrinks = !made && (pass.need_x || pass.need_A || pass.dv != nullptr);
  s.shrink = {pass.dy, transposed(pass.b), at.g_d, d_on_du, pass.scaling, {}, pass.M, pass.N, pass.R, du,
              partial, pass.stream};

  LoraGradArgs& x = s.x;
  s.over_x = pass.need_A && pass.M > 0 && pass.K > 0;
  x.in = pass.x, x.dropout = pass.dropout, x.M = pass.M, x.C = pass.K, x.R = pass.R;
  x.v = du, x.v_scale = d_later, x.alpha = 1, x.column_scale = at.p_d, x.grad = pass.dA;
  for (LoraGradArgs* each : {&dy, &x}) {
    each->partial = partial, each->stream = pass.stream, each->dependent = pass.arch >= 90;
  }

  LoraLinearArgs& dx = s.dx;
  dx = product_of(pass);
  dx.N = pass.K, dx.K = pass.N;
  dx.x = pass.dy, dx.out = pass.dx, dx.v = du, dx.b = transposed(pass.a);
  set_weight(dx, transposed(pass.w));
  dx.scaling = 1, dx.dropout = pass.dropout;
  dx.scales = {d_later, nullptr, nullptr, at.p_b, at.p_d};

  if (s.over_dy) s.partial = lora_grad_partials(dy);
  if (s.over_x) s.partial = std::max(s.partial, lora_grad_partials(x));
  if (s.shrinks) s.partial = std::max(s.partial, lora_shrink_partials(pass.M, pass.N, pass.R, pass.dy.dtype));
  return s;
}

}  // namespace

PassMemory lora_forward_memory(const LoraForward& pass) {
  if (takes_whole(pass)) return {0, lora_linear_counters(pass.M)};
  return {lora_shrink_partials(pass.M, pass.K, pass.R, pass.x.dtype), 0};
}

const char* lora_forward(const LoraForward& pass) {
  if (takes_whole(pass)) return lora_linear_sm90(whole_forward(pass));
  if (const char* error = lora_shrink(forward_shrink(pass))) return error;
  const LoraLinearArgs product = forward_product(pass);
  if (pass.codes == nullptr) return start_product(product, pass.arch);
  if (!lora_linear_codes_takes(product, *pass.codes)) return kNotTaken;
  // Without ranks nothing was launched: what came before may write x.
  return lora_linear_codes(product, *pass.codes, pass.arch >= 90 && pass.R > 0);
}

PassMemory lora_backward_memory(const LoraBackward& pass) {
  // What is there decides on sizes, not where it lies.
  static float anywhere;
  LoraBackward placed = pass;
  placed.scratch = &anywhere;
  const BackwardSteps s = steps_of(placed);
  return {s.du + s.partial, 0};
}

const char* lora_backward(const LoraBackward& pass) {
  const BackwardSteps s = steps_of(pass);
  const char* error = nullptr;
  if (s.over_dy) error = lora_grad(s.dy);
  if (error == nullptr && s.shrinks) error = lora_shrink(s.shrink);
  if (error == nullptr && s.over_x) error = lora_grad(s.x);
  if (error == nullptr && pass.need_x) error = start_product(s.dx, pass.arch);
  return error;
}

}  // namespace peftkern::cuda
