// The branch by products of bf16, where base_gemm_bf16 is usable and x and the adapters are bf16. Sums are
// fp32; u and du are rounded to bf16 where they meet a matrix, as every operand of such a product. An
// element's bits depend on the length of its sum alone.
#pragma once

#include "cpu/base/product.h"
#include "cpu/lora/steps.h"

namespace peftkern::cpu {

// out (rows, cols), contiguous rows, = alpha m, by several threads if that is worth it.
inline void copy_rows(const ConstMatrix& m, int64_t rows, int64_t cols, float alpha, const Matrix& out,
                      int threads) {
  scale_copy({m, out, rows, cols, 0, alpha, nullptr, nullptr, worth_threads(4 * rows * cols, threads)});
}

// Room for a matrix (rows, cols) of bf16, with adjacent columns.
inline Matrix in_pairs(int64_t rows, int64_t cols, KeptScratch& scratch) {
  return {scratch.take((rows * cols + 1) / 2), DType::bf16, cols, 1};
}

// alpha m, m (rows, cols), rounded to bf16, with adjacent columns.
inline ConstMatrix rounded(const ConstMatrix& m, int64_t rows, int64_t cols, float alpha, int threads,
                           KeptScratch& scratch) {
  const Matrix out = in_pairs(rows, cols, scratch);
  copy_rows(m, rows, cols, alpha, out, threads);
  return as_const(out);
}

inline BaseProduct pair_product(int64_t M, int64_t D, int64_t C, const ConstMatrix& a, const ConstMatrix& b,
                                int threads) {
  return {BaseKind::bf16, M, D, C, a, b, nullptr, {}, nullptr, threads};
}

// out (M, D) of any dtype and strides = alpha a b, a (M, C) and b (C, D) bf16; no size is 0.
inline void multiply_pairs(int64_t M, int64_t D, int64_t C, const ConstMatrix& a, const ConstMatrix& b,
                           float alpha, const Matrix& out, int threads) {
  KeptScratch scratch;
  base_product(pair_product(M, D, C, a, b, threads), scratch,
               [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, const ConstMatrix& block) {
                 copy_rows(block, r1 - r0, c1 - c0, alpha, from(out, r0, c0), threads);
               });
}

// rows x cols of m from (r0, c0) on as dropout leaves them, before the division by 1 - p.
inline ConstMatrix dropped(const ConstMatrix& m, const Dropout& drop, int64_t r0, int64_t rows, int64_t c0,
                           int64_t cols, int threads, KeptScratch& scratch) {
  const ConstMatrix part = from(m, r0, c0);
  const Matrix out = in_pairs(rows, cols, scratch);
  if (part.col != 1) copy_rows(part, rows, cols, 1.0f, out, threads);
  drop_copy({part.col != 1 ? as_const(out) : part,
             {drop.seed, drop.threshold, r0, c0},
             rows,
             cols,
             out,
             worth_threads(4 * rows * cols, threads)});
  return as_const(out);
}

// Elements of a part of x that is copied for dropout: 16 MB.
constexpr int64_t kDroppedElements = int64_t{8} << 20;

// out (M, R), fp32, = alpha drop(x) A^T.
inline void shrink_pairs(int64_t M, int64_t R, int64_t K, const ConstMatrix& x, const Dropout& drop,
                         const ConstMatrix& A, float alpha, const Matrix& out, int threads) {
  const int64_t step = drop.threshold == 0 ? M : std::max<int64_t>(kDroppedElements / K, 1);
  for (int64_t r = 0; r < M; r += step) {
    KeptScratch scratch;
    const int64_t rows = std::min(step, M - r);
    multiply_pairs(rows, R, K, drop.threshold == 0 ? x : dropped(x, drop, r, rows, 0, K, threads, scratch),
                   transposed(A), alpha, from(out, r, 0), threads);
  }
}

// out (R, K) = alpha v^T drop(x), v^T (R, M) being bf16.
inline void sum_pairs(int64_t R, int64_t K, int64_t M, const ConstMatrix& v, const ConstMatrix& x,
                      const Dropout& drop, float alpha, const Matrix& out, int threads) {
  const int64_t most = std::max<int64_t>(kDroppedElements / M / kBaseTileCols, 1) * kBaseTileCols;
  const int64_t step = drop.threshold == 0 ? K : most;
  for (int64_t c = 0; c < K; c += step) {
    KeptScratch scratch;
    const int64_t cols = std::min(step, K - c);
    multiply_pairs(R, cols, M, v, drop.threshold == 0 ? x : dropped(x, drop, 0, M, c, cols, threads, scratch),
                   alpha, from(out, 0, c), threads);
  }
}

// lora_expand of v (M, R) and p (R, C), both bf16. src may be written to if it is fp32: a block of products.
inline void expand_pairs(const LoraExpandArgs& args, const ConstMatrix& v, const ConstMatrix& p) {
  KeptScratch scratch;
  if (args.src.dtype == DType::f32 && args.base_scale == nullptr && args.dropout.threshold == 0 &&
      args.alpha == 1.0f) {
    // One sum, in the block itself.
    float* block = const_cast<float*>(static_cast<const float*>(args.src.data));
    BaseArgs sum{v.data, v.row,        v.col,  p.data, p.col,  p.row,   DType::bf16, nullptr,
                 block,  args.src.row, args.M, args.C, args.R, nullptr, args.threads};
    sum.scratch = scratch.take(base_gemm_scratch(args.M, args.threads)), sum.add = true;
    base_gemm_bf16(sum);
    LoraExpandArgs rest = args;
    rest.R = 0;
    lora_expand(rest);
    return;
  }
  base_product(pair_product(args.M, args.C, args.R, v, p, args.threads), scratch,
               [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, const ConstMatrix& block) {
                 LoraExpandArgs part = args;
                 part.out = from(args.out, r0, c0), part.src = from(args.src, r0, c0);
                 part.M = r1 - r0, part.C = c1 - c0;
                 part.delta = static_cast<const float*>(block.data), part.ldd = block.row;
                 part.dropout.row0 += r0, part.dropout.col0 += c0;
                 if (args.base_scale != nullptr) part.base_scale += c0;
                 if (args.bias != nullptr) part.bias += c0;
                 lora_expand(part);
               });
}

}  // namespace peftkern::cpu
