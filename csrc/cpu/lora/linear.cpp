#include "cpu/lora/linear.h"

#include "cpu/lora/steps.h"

namespace peftkern::cpu {
namespace {

// What all steps of a backward pass read.
struct Backward {
  const LoraLinearBackward& g;
  KeptScratch& scratch;
  const float *d, *p_d, *g_d;
  float* du;  // (M, R)
  float* G;   // (R, N): u^T dy
};

// One pass over dy: du (still without d, if d trains), u^T dy and the bias gradient.
void reduce_dy(const Backward& b) {
  const LoraLinearBackward& g = b.g;
  LoraReduceArgs args{};
  args.in = g.dy, args.M = g.M, args.C = g.N, args.R = g.R;
  args.alpha_dot = args.alpha_outer = 1.0f;
  args.v = b.G != nullptr ? g.u : nullptr, args.g = b.G, args.colsum = g.dbias;
  if (b.du != nullptr) {
    const Panel p = as_panel(transposed(g.B), g.R, g.N, g.scaling, g.dd != nullptr ? nullptr : b.d, b.g_d,
                             g.threads, b.scratch);
    args.p = p.data, args.ldp = p.ld, args.out = b.du;
  }
  reduce_both(args, g.threads);
}

// Gradients of d, B, g_d and g_b. d acts on du and G here, if it has not yet.
void finish_dy(const Backward& b) {
  const LoraLinearBackward& g = b.g;
  const ConstMatrix du{b.du, DType::f32, g.R, 1}, G{b.G, DType::f32, g.N, 1};
  if (g.dd != nullptr) {
    dot_columns(du, {g.u, DType::f32, g.R, 1}, g.M, g.R, g.dd, false, g.threads);
    scale_in_place(b.du, g.M, g.R, nullptr, b.d);
  }
  // G = u^T dy, so H^T = d G.
  if (g.dB.data != nullptr) {
    scale_copy(
        {G, transposed(g.dB), g.R, g.N, 0, g.scaling, b.d, b.g_d, worth_threads(4 * g.R * g.N, g.threads)});
  }
  if (g.dg_d != nullptr) {
    scale_in_place(b.G, g.R, g.N, b.d, nullptr);
    dot_columns(G, transposed(g.B), g.R, g.N, g.dg_d, false, g.threads);
    for (int64_t i = 0; i < g.N; ++i) g.dg_d[i] *= g.scaling;
  }
  if (g.dg_b != nullptr) dot_columns(g.dy, g.h, g.M, g.N, g.dg_b, false, g.threads);
}

// dA = (du^T drop(x)) p_d and dp_d = coldot(A, du^T drop(x)), from one pass over x.
void grad_A(const Backward& b) {
  const LoraLinearBackward& g = b.g;
  if (g.dA.data == nullptr && g.dp_d == nullptr) return;
  const bool in_place = g.dA.data != nullptr && g.dA.dtype == DType::f32 && b.p_d == nullptr;
  float* G = in_place ? static_cast<float*>(g.dA.data) : b.scratch.take(g.R * g.K);
  LoraReduceArgs args{};
  args.in = g.x, args.M = g.M, args.C = g.K, args.R = g.R, args.dropout = g.dropout;
  args.v = b.du, args.g = G, args.alpha_outer = g.kept_scale;
  reduce(args, g.threads);
  const ConstMatrix result{G, DType::f32, g.K, 1};
  if (g.dp_d != nullptr) dot_columns(result, g.A, g.R, g.K, g.dp_d, false, g.threads);
  if (g.dA.data != nullptr && !in_place) {
    scale_copy({result, g.dA, g.R, g.K, 0, 1.0f, nullptr, b.p_d, worth_threads(4 * g.R * g.K, g.threads)});
  }
}

// dx: the forward pattern with W and A. dp_b falls out of its blocks.
void grad_x(const Backward& b) {
  const LoraLinearBackward& g = b.g;
  if (g.dp_b != nullptr) std::fill_n(g.dp_b, g.K, 0.0f);
  if (g.dx.data == nullptr) return;
  const float* in_scale = as_floats(g.p_b, g.K, b.scratch);
  const float* out_scale = as_floats(g.g_b, g.N, b.scratch);
  const Panel p = as_panel(g.A, g.R, g.K, 1.0f, nullptr, b.p_d, g.threads, b.scratch);
  const BaseProduct base{g.kind,    g.M,  g.K,      g.N,       g.dy,       g.weight,
                         out_scale, g.dx, g.vendor, g.threads, g.quantised};
  base_product(
      base, b.scratch, [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, const ConstMatrix& block) {
        const int64_t rows = r1 - r0, cols = c1 - c0;
        if (g.dp_b != nullptr)
          dot_columns(block, from(g.x, r0, c0), rows, cols, g.dp_b + c0, true, g.threads);
        const Dropout dropout{g.dropout.seed, g.dropout.threshold, r0, c0};
        lora_expand({from(g.dx, r0, c0), block, nullptr, rows, cols, g.R, b.du + r0 * g.R, g.R, p.data + c0,
                     p.ld, g.kept_scale, dropout, in_scale != nullptr ? in_scale + c0 : nullptr, nullptr,
                     worth_threads(rows * cols * std::max<int64_t>(g.R, 1), g.threads)});
      });
}

}  // namespace

void lora_linear_forward(const LoraLinearForward& g) {
  KeptScratch scratch;
  LoraReduceArgs shrink{};
  shrink.in = g.x, shrink.M = g.M, shrink.C = g.K, shrink.R = g.R, shrink.dropout = g.dropout;
  const Panel a = as_panel(g.A, g.R, g.K, 1.0f, nullptr, as_floats(g.p_d, g.K, scratch), g.threads, scratch);
  float* u = g.u != nullptr ? g.u : scratch.take(g.M * g.R);
  shrink.p = a.data, shrink.ldp = a.ld, shrink.out = u, shrink.alpha_dot = g.kept_scale;
  reduce(shrink, g.threads);
  const Panel p = as_panel(transposed(g.B), g.R, g.N, g.scaling, as_floats(g.d, g.R, scratch),
                           as_floats(g.g_d, g.N, scratch), g.threads, scratch);
  const float* bias = as_floats(g.bias, g.N, scratch);
  const float* in_scale = as_floats(g.p_b, g.K, scratch);
  const float* out_scale = as_floats(g.g_b, g.N, scratch);
  const bool keep = g.h.data != nullptr;
  const Matrix& product = keep ? g.h : g.y;
  const BaseProduct base{g.kind,   g.M,     g.N,      g.K,       g.x,        transposed(g.weight),
                         in_scale, product, g.vendor, g.threads, g.quantised};
  base_product(base, scratch, [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, const ConstMatrix& block) {
    const int64_t rows = r1 - r0, cols = c1 - c0;
    const Matrix saved = from(product, r0, c0);
    if (keep && block.data != saved.data) {
      scale_copy(
          {block, saved, rows, cols, 0, 1.0f, nullptr, nullptr, worth_threads(4 * rows * cols, g.threads)});
    }
    lora_expand({from(g.y, r0, c0), block, nullptr, rows, cols, g.R, u + r0 * g.R, g.R, p.data + c0, p.ld,
                 1.0f, Dropout{}, out_scale != nullptr ? out_scale + c0 : nullptr,
                 bias != nullptr ? bias + c0 : nullptr,
                 worth_threads(rows * cols * std::max<int64_t>(g.R, 1), g.threads)});
  });
}

void lora_linear_backward(const LoraLinearBackward& g) {
  KeptScratch scratch;
  const bool du = g.dx.data != nullptr || g.dA.data != nullptr || g.dp_d != nullptr || g.dd != nullptr;
  const bool G = g.dB.data != nullptr || g.dg_d != nullptr;
  const Backward b{g,
                   scratch,
                   as_floats(g.d, g.R, scratch),
                   as_floats(g.p_d, g.K, scratch),
                   as_floats(g.g_d, g.N, scratch),
                   du ? scratch.take(g.M * g.R) : nullptr,
                   G ? scratch.take(g.R * g.N) : nullptr};
  reduce_dy(b);
  finish_dy(b);
  grad_A(b);
  grad_x(b);
}

}  // namespace peftkern::cpu
