// A bottleneck in half precision by products of bf16 (base_gemm_bf16), for CPUs where those are faster than
// what bottleneck.cpp makes of fp32. t, dv and all sums are fp32; z and dt are rounded to bf16 where they
// meet a matrix, as every operand of such a product. Between calls nothing is kept but scratch; of M x N or
// M x K nothing is made but results, and copies of what dropout has acted on.
#include "cpu/base/product.h"
#include "cpu/bottleneck/passes.h"

namespace peftkern::cpu {
namespace {

// A block of a product of M x N, which stays in cache until it is added to the stream.
constexpr int64_t kBlockRows = 256, kBlockCols = 1024;

// out (rows, cols) = in, in bf16.
ConstMatrix as_bf16(const ConstMatrix& in, int64_t rows, int64_t cols, const float* col_scale, int threads,
                    KeptScratch& scratch) {
  const Matrix out{scratch.take((rows * cols + 1) / 2), DType::bf16, cols, 1};
  scale_copy({in, out, rows, cols, 0, 1.0f, nullptr, col_scale, worth_threads(4 * rows * cols, threads)});
  return as_const(out);
}

// m with adjacent columns, and what dropout leaves of it times `kept`.
ConstMatrix dropped(ConstMatrix m, int64_t rows, int64_t cols, const Dropout& drop, float kept, int threads,
                    KeptScratch& scratch) {
  if (m.data == nullptr) return m;
  if (m.col != 1) m = as_bf16(m, rows, cols, nullptr, threads, scratch);
  if (drop.threshold == 0) return m;
  const Matrix out{scratch.take((rows * cols + 1) / 2), DType::bf16, cols, 1};
  add_run({out, {}, m, rows, cols, kept, nullptr, nullptr, drop, worth_threads(4 * rows * cols, threads)});
  return as_const(out);
}

// out (M, D) in fp32 = a (M, C) b (C, D).
void product(int64_t M, int64_t D, int64_t C, const ConstMatrix& a, const ConstMatrix& b, float* out,
             int threads, KeptScratch& scratch) {
  if (M == 0 || D == 0) return;
  if (C == 0) return fill_zeros(out, M * D);
  const BaseProduct g{BaseKind::bf16, M, D, C, a, b, nullptr, {}, nullptr, worth_threads(M * D * C, threads)};
  const BaseBlocks blocks = base_blocks(g.kind, M, D, C, g.threads);
  float* room = scratch.take(blocks.scratch);
  for (int64_t r = 0; r < M; r += blocks.rows)
    for (int64_t c = 0; c < D; c += blocks.cols)
      fill_panel(g, blocks, g.threads, r, std::min(M, r + blocks.rows), c, std::min(D, c + blocks.cols),
                 out + r * D + c, D, room);
}

// out (M, D) = to + drop(alpha * scale * (v p) + bias), v (M, R), p (R, D); to, scale and bias may be absent.
void add_product(const AddTask& whole, int64_t R, const ConstMatrix& v, const ConstMatrix& p,
                 KeptScratch& kept) {
  const auto at = [](const float* vector, int64_t c) { return vector != nullptr ? vector + c : nullptr; };
  const int64_t M = whole.M, D = whole.C, ld = std::min(D, kBlockCols);
  float* panel = kept.take(std::min(M, kBlockRows) * ld);
  for (int64_t c = 0; c < D; c += kBlockCols) {
    for (int64_t r = 0; r < M; r += kBlockRows) {
      KeptScratch scratch;
      const int64_t rows = std::min(kBlockRows, M - r), cols = std::min(kBlockCols, D - c);
      product(rows, cols, R, from(v, r, 0), from(p, 0, c), panel, whole.threads, scratch);
      AddTask task = whole;
      task.out = from(whole.out, r, c), task.delta = {panel, DType::f32, cols, 1};
      if (whole.to.data != nullptr) task.to = from(whole.to, r, c);
      task.M = rows, task.C = cols, task.scale = at(whole.scale, c), task.bias = at(whole.bias, c);
      task.dropout.row0 += r, task.dropout.col0 += c;
      task.threads = worth_threads(4 * rows * cols, whole.threads);
      add_run(task);
    }
  }
}

}  // namespace

void bottleneck_forward_pairs(const BottleneckForward& g) {
  KeptScratch scratch;
  const float* c = as_floats(g.out_scale, g.N, scratch);
  const ConstMatrix h = dropped(g.h, g.M, g.K, g.drop_in, g.kept_in, g.threads, scratch);
  float* t = g.t != nullptr ? g.t : scratch.take(g.M * g.R);
  product(g.M, g.R, g.K, h, transposed(g.down), t, g.threads, scratch);
  float* z = scratch.take(g.M * g.R);
  activate_run({g.activation, g.M, g.R, t, as_floats(g.down_bias, g.R, scratch), t, nullptr, z, false,
                activation_threads(g)});
  const float alpha = g.scaling * g.kept_out;
  float* bias = g.up_bias.data != nullptr ? scratch.take(g.N) : nullptr;
  if (bias != nullptr) scale_copy({g.up_bias, {bias, DType::f32, g.N, 1}, 1, g.N, 0, alpha, nullptr, c, 1});
  const ConstMatrix to =
      dropped(g.residual.data != nullptr ? g.residual : g.h, g.M, g.N, {}, 1.0f, g.threads, scratch);
  add_product({g.y, to, {}, g.M, g.N, alpha, c, bias, g.drop_out, g.threads}, g.R,
              as_bf16({z, DType::f32, g.R, 1}, g.M, g.R, nullptr, g.threads, scratch), transposed(g.up),
              scratch);
}

void bottleneck_backward_pairs(const BottleneckBackward& g) {
  KeptScratch scratch;
  const Steps steps(g);
  const float* c = as_floats(g.out_scale, g.N, scratch);
  const ConstMatrix dy = dropped(g.dy, g.M, g.N, {}, 1.0f, g.threads, scratch);
  const ConstMatrix e = dropped(dy, g.M, g.N, g.drop_out, g.kept_out, g.threads, scratch);
  if (steps.after) {
    const int64_t ranks = g.R + steps.ones;
    float *z = scratch.take(g.M * ranks), *G = scratch.take(ranks * g.N);
    activate_run(
        {g.activation, g.M, g.R, g.t, nullptr, nullptr, nullptr, z, steps.ones, activation_threads(g)});
    const ConstMatrix across =
        as_bf16(transposed(ConstMatrix{z, DType::f32, ranks, 1}), ranks, g.M, nullptr, g.threads, scratch);
    product(ranks, g.N, g.M, across, e, G, g.threads, scratch);
    finish_up(g, c, steps.ones, g.scaling, G);
  }
  if (!steps.slope) return;
  const ConstMatrix up =
      c == nullptr ? g.up : transposed(as_bf16(transposed(g.up), g.R, g.N, c, g.threads, scratch));
  float* dt = scratch.take(g.M * g.R);
  product(g.M, g.R, g.N, e, up, dt, g.threads, scratch);
  SlopeTask slope{g.activation, g.M, g.R, g.t, dt, false, nullptr, dt, nullptr, activation_threads(g)};
  slope.alpha = g.scaling;
  slope_run(slope);
  const ConstMatrix rows{dt, DType::f32, g.R, 1};
  if (g.ddown_bias != nullptr) dot_columns(rows, {}, g.M, g.R, g.ddown_bias, false, g.threads);
  if (g.ddown.data != nullptr) {
    const ConstMatrix h = dropped(g.h, g.M, g.K, g.drop_in, g.kept_in, g.threads, scratch);
    float* sums = scratch.take(g.R * g.K);
    product(g.R, g.K, g.M, as_bf16(transposed(rows), g.R, g.M, nullptr, g.threads, scratch), h, sums,
            g.threads, scratch);
    scale_copy({{sums, DType::f32, g.K, 1},
                g.ddown,
                g.R,
                g.K,
                0,
                1.0f,
                nullptr,
                nullptr,
                worth_threads(4 * g.R * g.K, g.threads)});
  }
  if (g.dh.data == nullptr) return;
  add_product(
      {g.dh, g.through ? dy : ConstMatrix{}, {}, g.M, g.K, g.kept_in, nullptr, nullptr, g.drop_in, g.threads},
      g.R, as_bf16(rows, g.M, g.R, nullptr, g.threads, scratch), g.down, scratch);
}

}  // namespace peftkern::cpu
