// A bottleneck as passes of the low-rank branch (csrc/cpu/lora) with its activation between them. Where the
// bias b_up takes part in what gates and dropout do, it is one rank more: a row of U^T that meets a column of
// ones.
#include "cpu/bottleneck/bottleneck.h"

#include "cpu/bottleneck/passes.h"
#include "cpu/common/dispatch.h"

PEFTKERN_DISPATCH(activate_run, ActivateTask)
PEFTKERN_DISPATCH(slope_run, SlopeTask)

namespace peftkern::cpu {
namespace {

// s c * U^T, and with `bias` s c * b_up as one more row, zeros if there is none.
Panel panel_of_up(const Bottleneck& g, const float* c, bool bias, KeptScratch& scratch) {
  if (!bias) return as_panel(transposed(g.up), g.R, g.N, g.scaling, nullptr, c, g.threads, scratch);
  const int64_t ld = padded(g.N), pad = ld - g.N;
  float* out = scratch.take((g.R + 1) * ld);
  scale_copy({transposed(g.up),
              {out, DType::f32, ld, 1},
              g.R,
              g.N,
              pad,
              g.scaling,
              nullptr,
              c,
              worth_threads(4 * g.R * g.N, g.threads)});
  float* last = out + g.R * ld;
  if (g.up_bias.data != nullptr) {
    scale_copy({g.up_bias, {last, DType::f32, ld, 1}, 1, g.N, pad, g.scaling, nullptr, c, 1});
  } else {
    fill_zeros(last, ld);
  }
  return {out, ld};
}

// A (rows, cols) that expand can add to: itself, or copied to where the sum will be.
ConstMatrix addend(const ConstMatrix& m, const Matrix& out, int64_t rows, int64_t cols, int threads) {
  if (m.data == nullptr || m.col == 1) return m;
  scale_copy({m, out, rows, cols, 0, 1.0f, nullptr, nullptr, worth_threads(4 * rows * cols, threads)});
  return as_const(out);
}

// out (R, C) = alpha * v^T drop(in), rounded to its dtype.
void reduce_rows(LoraReduceArgs args, const Matrix& out, int threads, KeptScratch& scratch) {
  const bool in_place = out.dtype == DType::f32;
  args.g = in_place ? static_cast<float*>(out.data) : scratch.take(args.R * args.C);
  reduce(args, threads);
  if (in_place) return;
  scale_copy({{args.g, DType::f32, args.C, 1},
              out,
              args.R,
              args.C,
              0,
              1.0f,
              nullptr,
              nullptr,
              worth_threads(4 * args.R * args.C, threads)});
}

// What follows from dt: gradients of D, b_down and h.
void finish_down(const BottleneckBackward& g, const float* dt, KeptScratch& scratch) {
  if (g.ddown_bias != nullptr)
    dot_columns({dt, DType::f32, g.R, 1}, {}, g.M, g.R, g.ddown_bias, false, g.threads);
  if (g.ddown.data != nullptr) {
    LoraReduceArgs args{};
    args.in = g.h, args.M = g.M, args.C = g.K, args.R = g.R, args.dropout = g.drop_in;
    args.v = dt, args.alpha_outer = g.kept_in;
    reduce_rows(args, g.ddown, g.threads, scratch);
  }
  if (g.dh.data == nullptr) return;
  const ConstMatrix through = addend(g.through ? g.dy : ConstMatrix{}, g.dh, g.M, g.K, g.threads);
  const Panel p = as_panel(g.down, g.R, g.K, 1.0f, nullptr, nullptr, g.threads, scratch);
  lora_expand({g.dh, through, nullptr, g.M, g.K, g.R, dt, g.R, p.data, p.ld, g.kept_in, g.drop_in, nullptr,
               nullptr, worth_threads(g.M * g.K * std::max<int64_t>(g.R, 1), g.threads)});
}

}  // namespace

void finish_up(const BottleneckBackward& g, const float* c, bool ones, float alpha, float* G) {
  const ConstMatrix H{G, DType::f32, g.N, 1};
  float* S = ones ? G + g.R * g.N : nullptr;
  if (g.dout_scale != nullptr) {
    dot_columns(H, transposed(g.up), g.R, g.N, g.dout_scale, false, g.threads);
    if (g.up_bias.data != nullptr)
      dot_columns({S, DType::f32, g.N, 1}, g.up_bias, 1, g.N, g.dout_scale, true, g.threads);
    for (int64_t i = 0; i < g.N; ++i) g.dout_scale[i] *= alpha;
  }
  if (g.dup.data != nullptr) {
    scale_copy(
        {H, transposed(g.dup), g.R, g.N, 0, alpha, nullptr, c, worth_threads(4 * g.R * g.N, g.threads)});
  }
  if (g.dup_bias != nullptr)
    scale_copy({{S, DType::f32, g.N, 1}, {g.dup_bias, DType::f32, g.N, 1}, 1, g.N, 0, alpha, nullptr, c, 1});
}

void bottleneck_forward(const BottleneckForward& g) {
#ifdef PEFTKERN_HAVE_AVX512_BF16
  if (by_pairs(g)) return bottleneck_forward_pairs(g);
#endif
  KeptScratch scratch;
  const float* c = as_floats(g.out_scale, g.N, scratch);
  const float* gate = as_floats(g.gate, g.M, scratch);
  LoraReduceArgs shrink{};
  shrink.in = g.h, shrink.M = g.M, shrink.C = g.K, shrink.R = g.R, shrink.dropout = g.drop_in;
  const Panel d = as_panel(g.down, g.R, g.K, 1.0f, nullptr, nullptr, g.threads, scratch);
  float* t = g.t != nullptr ? g.t : scratch.take(g.M * g.R);
  shrink.p = d.data, shrink.ldp = d.ld, shrink.out = t, shrink.alpha_dot = g.kept_in;
  reduce(shrink, g.threads);
  // A bias that nothing else acts on is added at the end.
  const bool biased = g.up_bias.data != nullptr;
  const bool ones = biased && (gate != nullptr || g.drop_out.threshold != 0);
  const int64_t ranks = g.R + ones;
  float* z = scratch.take(g.M * ranks);
  activate_run({g.activation, g.M, g.R, t, as_floats(g.down_bias, g.R, scratch), t, gate, z, ones,
                activation_threads(g)});
  const Panel up = panel_of_up(g, c, ones, scratch);
  float* bias = biased && !ones ? scratch.take(g.N) : nullptr;
  if (bias != nullptr)
    scale_copy({g.up_bias, {bias, DType::f32, g.N, 1}, 1, g.N, 0, g.scaling, nullptr, c, 1});
  const ConstMatrix to = addend(g.residual.data != nullptr ? g.residual : g.h, g.y, g.M, g.N, g.threads);
  lora_expand({g.y, to, nullptr, g.M, g.N, ranks, z, ranks, up.data, up.ld, g.kept_out, g.drop_out, nullptr,
               bias, worth_threads(g.M * g.N * std::max<int64_t>(ranks, 1), g.threads)});
}

void bottleneck_backward(const BottleneckBackward& g) {
#ifdef PEFTKERN_HAVE_AVX512_BF16
  if (by_pairs(g)) return bottleneck_backward_pairs(g);
#endif
  KeptScratch scratch;
  const auto [slope, after, ones] = Steps(g);
  const int64_t ranks = g.R + ones;
  const float* c = as_floats(g.out_scale, g.N, scratch);
  const float* gate = as_floats(g.gate, g.M, scratch);
  LoraReduceArgs args{};
  args.in = g.dy, args.M = g.M, args.C = g.N, args.R = ranks, args.dropout = g.drop_out;
  args.alpha_dot = g.kept_out, args.alpha_outer = g.kept_out * g.scaling;
  float *dv = nullptr, *G = nullptr;
  if (slope || g.dgate != nullptr) {
    const Panel up = panel_of_up(g, c, ones, scratch);
    args.p = up.data, args.ldp = up.ld, args.out = dv = scratch.take(g.M * ranks);
  }
  if (after) {
    float* z = scratch.take(g.M * ranks);
    activate_run({g.activation, g.M, g.R, g.t, nullptr, nullptr, gate, z, ones, activation_threads(g)});
    args.v = z, args.g = G = scratch.take(ranks * g.N);
  }
  reduce_both(args, g.threads);
  if (after) finish_up(g, c, ones, 1.0f, G);
  if (dv == nullptr) return;
  float* dt = slope ? scratch.take(g.M * g.R) : nullptr;
  slope_run({g.activation, g.M, g.R, g.t, dv, ones, gate, dt, g.dgate, activation_threads(g)});
  if (slope) finish_down(g, dt, scratch);
}

}  // namespace peftkern::cpu
