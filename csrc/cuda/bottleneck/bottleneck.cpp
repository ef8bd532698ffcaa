// Forward: one pass over h makes t, another puts the branch onto the residual. Backward: f(t) and its slope
// come from t; one pass over dy gives dv, the gradient of up and the sums over rows, one over h the gradient
// of down, and the input gradient is the forward's second pass with up and down exchanged.
#include "cuda/bottleneck/bottleneck.h"

#include <algorithm>

namespace peftkern::cuda {
namespace {

// Beyond, dv's partial sums in the pass that makes dup cost more than a pass of its own over dy.
constexpr int64_t kFusedDownRank = 64;

template <class M>
M transposed(const M& m) {
  return {m.data, m.dtype, m.col, m.row};
}

BottleneckOutArgs out_of(const BottleneckPass& pass) {
  BottleneckOutArgs args{};
  args.M = pass.M, args.R = pass.R, args.scaling = 1, args.stream = pass.stream;
  return args;
}

// scaling * drop(dy) (p * out_scale)^T.
LoraShrinkArgs shrink_dy(const BottleneckBackward& pass, const ConstMatrix& p, int64_t ranks, float* out,
                         float* partial) {
  return {pass.dy, p,      pass.out_scale, nullptr, pass.scaling, pass.drop_out,
          pass.M,  pass.N, ranks,          out,     partial,      pass.stream};
}

LoraGradArgs grad_of(const BottleneckBackward& pass, const ConstMatrix& in, int64_t columns, float* partial) {
  LoraGradArgs args{};
  args.in = in, args.M = pass.M, args.C = columns, args.R = pass.R, args.alpha = 1;
  args.partial = partial, args.stream = pass.stream, args.dependent = pass.arch >= 90;
  return args;
}

// What is launched. dt, unless it goes out, and z lie in front in scratch.
struct BackwardSteps {
  bool over_dy, weighs, shrinks, dots_bias, over_h;
  BottleneckRankArgs values, slopes;
  LoraGradArgs dy, weighted, h;
  LoraShrinkArgs dv, bias;
  BottleneckOutArgs dh;
  int64_t floats;
};

BackwardSteps steps_of(const BottleneckBackward& pass) {
  BackwardSteps s{};
  // 256 bytes, as torch's allocator aligns at least.
  constexpr int64_t kAlign = 64;
  const int64_t size = (pass.M * pass.R + kAlign - 1) / kAlign * kAlign;
  const auto take = [&](bool wanted) {
    float* at = wanted && pass.scratch != nullptr ? pass.scratch + s.floats : nullptr;
    s.floats += wanted ? size : 0;
    return at;
  };
  const bool dup = pass.dup.data != nullptr, dh = pass.dh.data != nullptr, ddown = pass.ddown.data != nullptr;
  const bool slopes = dh || ddown || pass.dt != nullptr || pass.dgate != nullptr;
  const bool weighted = pass.sums != nullptr && pass.weights != nullptr;
  float* dt = take(slopes && pass.dt == nullptr);
  if (pass.dt != nullptr) dt = pass.dt;
  float *z = take(dup), *partial = pass.scratch != nullptr ? pass.scratch + s.floats : nullptr;

  const bool empty = pass.M == 0 || pass.N == 0;
  const float* of_columns = pass.raw ? nullptr : pass.out_scale;
  s.over_dy = !empty && (dup || (pass.sums != nullptr && !weighted));
  s.weighs = !empty && weighted;
  s.over_h = ddown && pass.M > 0 && pass.K > 0;

  s.values = {pass.t,  nullptr, pass.gate, pass.activation, z,          nullptr,
              nullptr, false,   pass.M,    pass.R,          pass.stream};
  s.dy = grad_of(pass, pass.dy, pass.N, partial);
  s.dy.v = z, s.dy.alpha = pass.scaling, s.dy.column_scale = of_columns, s.dy.grad = transposed(pass.dup);
  s.dy.dropout = pass.drop_out;
  if (!weighted) s.dy.colsum = pass.sums;
  // The pass scales both products alike, and drops in one of them alone.
  const bool fused = slopes && s.over_dy && dup && pass.R <= kFusedDownRank && of_columns == pass.out_scale &&
                     pass.drop_out.seed == nullptr;
  if (fused) s.dy.p = transposed(pass.up), s.dy.down = dt, s.dy.down_alpha = pass.scaling;

  s.weighted = grad_of(pass, pass.dy, pass.N, partial);
  s.weighted.R = 1, s.weighted.v = pass.weights, s.weighted.dropout = pass.drop_out;
  s.weighted.grad = {pass.sums, DType::f32, pass.N, 1};

  s.shrinks = slopes && !fused;
  s.dv = shrink_dy(pass, transposed(pass.up), pass.R, dt, partial);
  s.dots_bias = pass.dgate != nullptr && pass.up_bias.data != nullptr;
  s.bias = shrink_dy(pass, {pass.up_bias.data, pass.up_bias.dtype, pass.N, 1}, 1, pass.dgate, partial);
  if (slopes) {
    s.slopes = {pass.t,     dt,          pass.gate, pass.activation, nullptr,    dt,
                pass.dgate, s.dots_bias, pass.M,    pass.R,          pass.stream};
  }

  s.h = grad_of(pass, pass.h, pass.K, partial);
  s.h.v = dt, s.h.grad = pass.ddown, s.h.dropout = pass.drop_in;

  s.dh = out_of(pass);
  if (pass.through) s.dh.residual = pass.dy;
  s.dh.v = dt, s.dh.b = transposed(pass.down), s.dh.dropout = pass.drop_in, s.dh.N = pass.K,
  s.dh.out = pass.dh;

  int64_t most = 0;
  if (s.over_dy) most = std::max(most, lora_grad_partials(s.dy));
  if (s.weighs) most = std::max(most, lora_grad_partials(s.weighted));
  if (s.over_h) most = std::max(most, lora_grad_partials(s.h));
  if (s.shrinks) most = std::max(most, lora_shrink_partials(pass.M, pass.N, pass.R, pass.dy.dtype));
  if (s.dots_bias) most = std::max(most, lora_shrink_partials(pass.M, pass.N, 1, pass.dy.dtype));
  s.floats += most;
  return s;
}

}  // namespace

int64_t bottleneck_forward_floats(const BottleneckForward& pass) {
  return lora_shrink_partials(pass.M, pass.K, pass.R, pass.h.dtype);
}

const char* bottleneck_forward(const BottleneckForward& pass) {
  const LoraShrinkArgs shrink{pass.h, pass.down, nullptr, nullptr,      1.0f,        pass.drop_in,  pass.M,
                              pass.K, pass.R,    pass.t,  pass.scratch, pass.stream, pass.down_bias};
  if (const char* error = lora_shrink(shrink)) return error;
  BottleneckOutArgs out = out_of(pass);
  out.residual = pass.residual, out.v = pass.t, out.activation = pass.activation, out.b = pass.up;
  out.bias = pass.up_bias, out.column_scale = pass.out_scale, out.gate = pass.gate,
  out.scaling = pass.scaling;
  out.dropout = pass.drop_out, out.N = pass.N, out.out = pass.y;
  return bottleneck_out(out);
}

int64_t bottleneck_backward_floats(const BottleneckBackward& pass) {
  // What is there decides on sizes, not where it lies.
  static float anywhere;
  BottleneckBackward placed = pass;
  placed.scratch = &anywhere;
  return steps_of(placed).floats;
}

const char* bottleneck_backward(const BottleneckBackward& pass) {
  const BackwardSteps s = steps_of(pass);
  const char* error = nullptr;
  const auto next = [&](bool wanted, auto launch, const auto& args) {
    if (error == nullptr && wanted) error = launch(args);
  };
  next(s.values.z != nullptr, bottleneck_rank, s.values);
  next(s.over_dy, lora_grad, s.dy);
  next(s.weighs, lora_grad, s.weighted);
  next(s.shrinks, lora_shrink, s.dv);
  next(s.dots_bias, lora_shrink, s.bias);
  next(s.slopes.dv != nullptr, bottleneck_rank, s.slopes);
  next(s.over_h, lora_grad, s.h);
  next(pass.dh.data != nullptr, bottleneck_out, s.dh);
  return error;
}

}  // namespace peftkern::cuda
