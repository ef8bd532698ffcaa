#include "cpu/lora/linear.h"

#include "cpu/lora/pairs.h"

namespace peftkern::cpu {
namespace {

// Where a size is 0 there are no products.
bool by_pairs(const LoraLinear& g) {
  return g.pairs && std::min({g.M, g.N, g.K, g.R}) > 0;
}

// What is added to the blocks of a base product: v p, v (M, R), p (R, C) times alpha and the scales of its
// rows and columns.
class Update {
 public:
  Update(const LoraLinear& g, const ConstMatrix& v, const ConstMatrix& p, int64_t C, float alpha,
         const float* row_scale, const float* col_scale, KeptScratch& scratch)
      : R_(g.R), v_(v) {
    if (by_pairs(g)) {
      p_ = p;
      if (v.dtype == DType::f32 || alpha != 1.0f) v_ = rounded(v, g.M, g.R, alpha, g.threads, scratch);
    } else {
      panel_ = as_panel(p, g.R, C, alpha, row_scale, col_scale, g.threads, scratch);
    }
  }
  // Into the block from (r0, c0) on; v and p are filled in.
  void add(LoraExpandArgs args, int64_t r0, int64_t c0) const {
    if (p_.data != nullptr) {
      expand_pairs(args, from(v_, r0, 0), from(p_, 0, c0));
      return;
    }
    args.v = static_cast<const float*>(from(v_, r0, 0).data), args.ldv = R_;
    args.p = panel_.data + c0, args.ldp = panel_.ld;
    lora_expand(args);
  }

 private:
  int64_t R_;
  ConstMatrix v_, p_;  // (M, R) and (R, C) in bf16, or fp32 and absent
  Panel panel_{};
};

// What all steps of a backward pass read.
struct Backward {
  const LoraLinearBackward& g;
  KeptScratch& scratch;
  const float *d, *p_d, *g_d;
  Matrix du;  // (M, R): bf16 for products of pairs, else fp32
  float* G;   // (R, N): u^T dy; not for products of pairs
};

// v^T (R, M) in bf16, with adjacent columns.
ConstMatrix across(const Backward& b, const ConstMatrix& v) {
  return rounded(transposed(v), b.g.R, b.g.M, 1.0f, b.g.threads, b.scratch);
}

// One pass over dy: du (still without d, if d trains), u^T dy and the bias gradient.
void reduce_dy(const Backward& b) {
  const LoraLinearBackward& g = b.g;
  LoraReduceArgs args{};
  args.in = g.dy, args.M = g.M, args.C = g.N, args.R = g.R;
  args.alpha_dot = args.alpha_outer = 1.0f;
  args.colsum = g.dbias;
  if (by_pairs(g)) {
    if (b.du.data != nullptr) multiply_pairs(g.M, g.R, g.N, g.dy, g.B, g.scaling, b.du, g.threads);
    if (g.dB.data != nullptr)
      multiply_pairs(g.R, g.N, g.M, across(b, {g.u, DType::f32, g.R, 1}), g.dy, g.scaling, transposed(g.dB),
                     g.threads);
    if (g.dbias != nullptr) reduce(args, g.threads);
    return;
  }
  args.v = b.G != nullptr ? g.u : nullptr, args.g = b.G;
  if (b.du.data != nullptr) {
    const Panel p = as_panel(transposed(g.B), g.R, g.N, g.scaling, g.dd != nullptr ? nullptr : b.d, b.g_d,
                             g.threads, b.scratch);
    args.p = p.data, args.ldp = p.ld, args.out = static_cast<float*>(b.du.data);
  }
  reduce_both(args, g.threads);
}

// Gradients of d, B, g_d and g_b. d acts on du and G here, if it has not yet.
void finish_dy(const Backward& b) {
  const LoraLinearBackward& g = b.g;
  const ConstMatrix G{b.G, DType::f32, g.N, 1};
  if (g.dd != nullptr) {
    dot_columns(as_const(b.du), {g.u, DType::f32, g.R, 1}, g.M, g.R, g.dd, false, g.threads);
    scale_in_place(static_cast<float*>(b.du.data), g.M, g.R, nullptr, b.d);
  }
  // G = u^T dy, so H^T = d G.
  if (g.dB.data != nullptr && b.G != nullptr) {
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
  if (by_pairs(g)) {
    sum_pairs(g.R, g.K, g.M, across(b, as_const(b.du)), g.x, g.dropout, g.kept_scale, g.dA, g.threads);
    return;
  }
  const bool in_place = g.dA.data != nullptr && g.dA.dtype == DType::f32 && b.p_d == nullptr;
  float* G = in_place ? static_cast<float*>(g.dA.data) : b.scratch.take(g.R * g.K);
  LoraReduceArgs args{};
  args.in = g.x, args.M = g.M, args.C = g.K, args.R = g.R, args.dropout = g.dropout;
  args.v = static_cast<const float*>(b.du.data), args.g = G, args.alpha_outer = g.kept_scale;
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
  const Update update(g, as_const(b.du), g.A, g.K, 1.0f, nullptr, b.p_d, b.scratch);
  const BaseProduct base{g.kind,    g.M,  g.K,      g.N,       g.dy,       g.weight,
                         out_scale, g.dx, g.vendor, g.threads, g.quantised};
  base_product(base, b.scratch,
               [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, const ConstMatrix& block) {
                 const int64_t rows = r1 - r0, cols = c1 - c0;
                 if (g.dp_b != nullptr)
                   dot_columns(block, from(g.x, r0, c0), rows, cols, g.dp_b + c0, true, g.threads);
                 const Dropout dropout{g.dropout.seed, g.dropout.threshold, r0, c0};
                 update.add({from(g.dx, r0, c0), block, nullptr, rows, cols, g.R, nullptr, 0, nullptr, 0,
                             g.kept_scale, dropout, in_scale != nullptr ? in_scale + c0 : nullptr, nullptr,
                             worth_threads(rows * cols * std::max<int64_t>(g.R, 1), g.threads)},
                            r0, c0);
               });
}

// u = (drop(x) * p_d) A^T
void shrink(const LoraLinear& g, float* u, KeptScratch& scratch) {
  if (by_pairs(g)) {
    shrink_pairs(g.M, g.R, g.K, g.x, g.dropout, g.A, g.kept_scale, {u, DType::f32, g.R, 1}, g.threads);
    return;
  }
  LoraReduceArgs args{};
  args.in = g.x, args.M = g.M, args.C = g.K, args.R = g.R, args.dropout = g.dropout;
  const Panel a = as_panel(g.A, g.R, g.K, 1.0f, nullptr, as_floats(g.p_d, g.K, scratch), g.threads, scratch);
  args.p = a.data, args.ldp = a.ld, args.out = u, args.alpha_dot = g.kept_scale;
  reduce(args, g.threads);
}

}  // namespace

void lora_linear_forward(const LoraLinearForward& g) {
  KeptScratch scratch;
  float* u = g.u != nullptr ? g.u : scratch.take(g.M * g.R);
  shrink(g, u, scratch);
  const Update update(g, {u, DType::f32, g.R, 1}, transposed(g.B), g.N, g.scaling,
                      as_floats(g.d, g.R, scratch), as_floats(g.g_d, g.N, scratch), scratch);
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
    update.add({from(g.y, r0, c0), block, nullptr, rows, cols, g.R, nullptr, 0, nullptr, 0, 1.0f, Dropout{},
                out_scale != nullptr ? out_scale + c0 : nullptr, bias != nullptr ? bias + c0 : nullptr,
                worth_threads(rows * cols * std::max<int64_t>(g.R, 1), g.threads)},
               r0, c0);
  });
}

void lora_linear_backward(const LoraLinearBackward& g) {
  KeptScratch scratch;
  const bool du = g.dx.data != nullptr || g.dA.data != nullptr || g.dp_d != nullptr || g.dd != nullptr;
  const bool G = (g.dB.data != nullptr || g.dg_d != nullptr) && !by_pairs(g);
  const Backward b{g,
                   scratch,
                   as_floats(g.d, g.R, scratch),
                   as_floats(g.p_d, g.K, scratch),
                   as_floats(g.g_d, g.N, scratch),
                   !du           ? Matrix{}
                   : by_pairs(g) ? in_pairs(g.M, g.R, scratch)
                                 : Matrix{scratch.take(g.M * g.R), DType::f32, g.R, 1},
                   G ? scratch.take(g.R * g.N) : nullptr};
  reduce_dy(b);
  finish_dy(b);
  grad_A(b);
  grad_x(b);
}

}  // namespace peftkern::cpu
