// What a bottleneck by products of bf16 is made of (pairs.cpp), each for CPUs with AVX512-BF16 alone.
//
// Packed operands are pairs of terms (base/pairs.h). On the right, (C, D): blocks of 256 terms, of each the
// tiles of 32 columns. On the left, (ranks, M): blocks of 256 rows, of each the ranks, kPairRow elements
// apart.
#pragma once

#include "cpu/bottleneck/bottleneck.h"

namespace peftkern::cpu {

// Rows that a thread takes through all steps at a time, and columns of what it adds to the stream.
constexpr int64_t kPairRows = 128, kPairPanel = 512;
// As in base/pairs.h: terms of a block, elements of a packed row on the left, columns of a tile.
constexpr int64_t kPairTerms = 256, kPairStep = 144, kPairCols = 32;

// (static: files compiled per level share no inline code.)
[[maybe_unused]] static constexpr int64_t pair_blocks(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}
// Elements of 4 bytes of a packed operand on the right (C, D), and on the left (ranks, M).
[[maybe_unused]] static constexpr int64_t pairs_right(int64_t C, int64_t D) {
  return pair_blocks(C, kPairTerms) * pair_blocks(D, kPairCols) * (kPairTerms / 2) * kPairCols;
}
[[maybe_unused]] static constexpr int64_t pairs_left(int64_t ranks, int64_t M) {
  return pair_blocks(M, kPairTerms) * ranks * kPairStep;
}

// out = b (C, D), any strides, packed as an operand on the right.
struct PairPackTask {
  ConstMatrix b;
  int64_t C, D;
  uint32_t* out;
  int threads;
};

// Row by row, with v = drop(in) first and z = f(t):
//
//   forward    t = alpha_v * v + bias      out = to + drop'(alpha * scale * (z second) + out_bias)
//   backward   dt = alpha_v * v * f'(t)    out = to + drop'(alpha * (dt second))
//
// in (M, C), first (C, R), second (R, D) packed, both or one of them absent in backward; out and `to` (M, D),
// `to`, the vectors and what is made for later may be null. Columns of matrices are adjacent.
struct PairRowsTask {
  bool backward;
  Activation activation;
  int64_t M, C, R, D;
  ConstMatrix in;
  Dropout drop;
  const uint32_t* first;
  float* t;           // (M, R): written forward, read backward
  const float* bias;  // (R)
  float alpha_v;
  float* dt;                       // (M, R)
  uint32_t *across_z, *across_dt;  // packed on the left: z (R or, with ones, R + 1; M) and dt (R, M)
  bool ones;
  const uint32_t* second;
  Matrix out;
  ConstMatrix to;
  float alpha;
  const float *scale, *out_bias;  // (D)
  Dropout out_drop;
  float* scratch;  // pair_rows_scratch floats a thread
  int threads;
};
[[maybe_unused]] static constexpr int64_t pair_rows_scratch(int64_t C, int64_t R, bool drops) {
  const int64_t left = kPairRows * kPairStep, ranks = pair_blocks(R + 1, kPairTerms);
  return left * (1 + 2 * ranks) + kPairRows * ((R + 15) / 16 * 16 + kPairPanel) +
         (drops ? kPairRows * ((C + 31) / 32 * 16) : 0);
}

// out (ranks, C) = v drop(in), v (ranks, M) packed on the left, in (M, C) with adjacent columns.
struct PairSumsTask {
  const uint32_t* v;
  int64_t ranks, M, C;
  ConstMatrix in;
  Dropout drop;
  float* out;
  int threads;
};

#ifdef PEFTKERN_HAVE_AVX512_BF16
namespace avx512_bf16 {
void pair_pack(const PairPackTask& task);
void pair_rows(const PairRowsTask& task);
void pair_sums(const PairSumsTask& task);
}  // namespace avx512_bf16
#endif

}  // namespace peftkern::cpu
