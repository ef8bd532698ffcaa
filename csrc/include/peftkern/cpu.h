// Every native entry point on the CPU (cuda.h has those on GPUs). Arguments are checked by csrc/bindings;
// `threads` is the most that a call may use.
#pragma once

#include "peftkern/quantised.h"
#include "peftkern/types.h"

namespace peftkern::cpu {

// The instruction set level in use: "plain", "avx2" or "avx512"; the best that the CPU has until set_isa
// lowers it.
const char* isa();
// Choose a level by name, or "auto". Returns false, changing nothing, if this CPU or build lacks it.
bool set_isa(const char* name);

// out[i, j] = 1 if element (row0 + i, col0 + j) is kept, else 0. out is M x C bytes.
struct DropoutMaskArgs {
  Dropout dropout;
  int64_t M, C;
  uint8_t* out;
  int threads;
};
void dropout_mask(const DropoutMaskArgs& args);

// out = drop(in), rows x cols of bf16 with adjacent columns; they may be one. Dropped elements are 0, the
// others as they were.
struct DropCopyArgs {
  ConstMatrix in;
  Dropout dropout;
  int64_t rows, cols;
  Matrix out;
  int threads;
};
void drop_copy(const DropCopyArgs& args);

// Multiply-adds of operands in registers, `steps` of a few vectors each on every thread: what is timed as the
// CPU's peak. sums: kPeakRoom floats a thread; flops: how many were done.
constexpr int64_t kPeakRoom = 16;
struct PeakArgs {
  int64_t steps;
  float value;
  float* sums;
  double* flops;
  int threads;
};
void fma_peak(const PeakArgs& args);
// The same of pairs of bf16, where base_gemm_bf16_usable().
void fma_peak_bf16(const PeakArgs& args);

// --- low-rank branch ---
// Panels p have zeros up to a multiple of this many columns.
constexpr int64_t kPadColumns = 16;

// One pass over in (M x C, any strides), any part of (see csrc/cpu/lora_reduce.cpp):
//   p given       out[i, r] = alpha_dot   * sum_c drop(in)[i, c] * p[r, c]
//   v given       g[r, c]   = alpha_outer * sum_i v[i, r] * drop(in)[i, c]
//   colsum given  colsum[c] = sum_i drop(in)[i, c]
// drop only zeroes: the division by 1 - p belongs in alpha.
struct LoraReduceArgs {
  ConstMatrix in;
  int64_t M, C, R;
  Dropout dropout;
  const float* p;
  int64_t ldp;
  float* out;
  int64_t ldo;
  float alpha_dot;
  const float* v;
  int64_t ldv;
  float* g;
  int64_t ldg;
  float alpha_outer;
  float* colsum;
  int threads;
};
void lora_reduce(const LoraReduceArgs& args);

// out[i, c] = round( base_scale[c] * src[i, c] + drop(alpha * sum_r v[i, r] * p[r, c]) * delta_scale[c] +
// bias[c] ) src: out itself (in place), another matrix in out's dtype or fp32, or null (zero). Scales and
// bias may be null. With `rows`, row i of the task is row rows[i] - dropout.row0 of out and src (v has the
// task's rows). With `delta`, fp32 rows of whole vectors, it takes the place of the products of v and p.
struct LoraExpandArgs {
  Matrix out;
  ConstMatrix src;
  const int32_t* rows;
  int64_t M, C, R;
  const float* v;
  int64_t ldv;
  const float* p;
  int64_t ldp;
  float alpha;
  Dropout dropout;
  const float* base_scale;
  const float* bias;
  int threads;
  const float* delta_scale = nullptr;
  const float* delta = nullptr;
  int64_t ldd = 0;
};
void lora_expand(const LoraExpandArgs& args);

// out[c] (+)= sum_i a[i, c] * b[i, c], any strides; b null: of a alone. With `rows`, row rows[i] takes the
// place of row i.
struct ColumnDotArgs {
  ConstMatrix a, b;
  int64_t M, C;
  float* out;
  bool accumulate;
  int threads;
  const int32_t* rows = nullptr;
};
void column_dot(const ColumnDotArgs& args);

// out[r, c] = round( alpha * row_scale[r] * col_scale[c] * in[r, c] ), then `pad` zero columns. Scales may be
// null.
struct ScaleCopyArgs {
  ConstMatrix in;
  Matrix out;
  int64_t rows, cols, pad;
  float alpha;
  const float* row_scale;
  const float* col_scale;
  int threads;
};
void scale_copy(const ScaleCopyArgs& args);

// out[n] = sqrt(sum_k (w[n, k] + scaling * sum_r b[n, r] * a[r, k])^2), any strides; quantised: in the place
// of w.
struct LoraRowNormArgs {
  ConstMatrix w, a, b;
  int64_t N, K, R;
  float scaling;
  float* out;
  int threads;
  const Quantised* quantised = nullptr;
};
void lora_row_norm(const LoraRowNormArgs& args);
// --- end of low-rank branch ---

// --- blocks of columns, each times a matrix (csrc/cpu/rotate) ---
// Columns of a block, at most.
constexpr int64_t kMaxBlock = 256;
// y[m, at(g * size + j)] = round( sum_i x[m, at(g * size + i)] * r[g, i, j] ), where at is index, or nothing
// (null). Block g of r is g * r_block elements from r.data, which is the first; 0: one for all. Rows of y are
// contiguous.
struct BlockRotateArgs {
  ConstMatrix x;
  Matrix y;
  ConstMatrix r;
  int64_t r_block;
  const int64_t* index;
  int64_t M, blocks, size;
  int threads;
};
void block_rotate(const BlockRotateArgs& args);
// out[g, i, j] = sum_m x[m, at(g * size + i)] * dy[m, at(g * size + j)], contiguous
struct BlockRotateGradArgs {
  ConstMatrix x, dy;
  const int64_t* index;
  int64_t M, blocks, size;
  float* out;
  int threads;
};
void block_rotate_grad(const BlockRotateGradArgs& args);
// --- end of blocks of columns ---

// --- base product (base_*.cpp) ---
// Features of this CPU beyond its level, as bits.
constexpr unsigned kX86 = 1, kIntel = 2, kAvx512Bf16 = 4, kAmxBf16 = 8, kAmxFp16 = 16, kAvx512Vnni = 32;
unsigned features();

// Who made this CPU and which it is, as CPUID says: an empty vendor where there is no CPUID.
struct CpuModel {
  char vendor[13];
  int family, model;
};
const CpuModel& cpu_model();

// out (rows x cols, fp32) = (a * scale) B, a (rows x inner) and B (inner x cols) of type dtype, any strides
// in elements: a[i, k] at i * a_row + k * a_col, B[k, j] at k * w_in + j * w_out. scale (inner) may be null.
struct BaseArgs {
  const void* a;
  int64_t a_row, a_col;
  const void* w;
  int64_t w_out, w_in;
  DType dtype;
  const float* scale;
  float* out;
  int64_t ld;
  int64_t rows, cols, inner;
  float* scratch;
  int threads;
  // A quantised weight in the place of w, whose N lies along the columns of B if w_in is 1 and its K if w_out
  // is, from this column on.
  const Quantised* quantised = nullptr;
  int64_t quantised_col = 0;
  // base_gemm_int8: of row i of a and of its column c, scales (col_scale may be null); sums of codes.
  const float *row_scale = nullptr, *col_scale = nullptr;
  const int32_t* row_sum = nullptr;
  bool add = false;  // to out, which is overwritten otherwise; of base_gemm and base_gemm_bf16 alone
};
// Packed elements of a block of the inner dimension, which one chain of multiply-adds sums up: longer chains
// lose accuracy against torch's product, and a packed tile of B is 16 KB, half an L1 cache. A packed row of a
// has room for a cache line more, or rows would share a few sets of the cache. Columns of a tile of B, at
// most.
constexpr int64_t kBaseChain = 128, kBaseRow = kBaseChain + 16, kBaseTileCols = 32;
// Rows that base_few takes, at most.
constexpr int64_t kBaseFewRows = 64;
// Floats of scratch that base_gemm needs. (static: files compiled per level share no inline code.)
[[maybe_unused]] static constexpr int64_t base_gemm_scratch(int64_t rows, int threads) {
  return 2 * rows * kBaseRow + threads * kBaseTileCols * kBaseChain;
}
// Any size.
void base_gemm(const BaseArgs& args);
// bf16 without a scale, on CPUs with AVX512-BF16 only: base_gemm_bf16_usable says whether this one and this
// build have it, at the level in use.
bool base_gemm_bf16_usable();
void base_gemm_bf16(const BaseArgs& args);
// The same by AMX's tiles, where base_gemm_amx_usable: it also asks the operating system, once, for the
// permission to use their registers.
bool base_gemm_amx_usable();
void base_gemm_amx(const BaseArgs& args);
// The same bits on any CPU, slowly: what tests hold the tiles to.
void base_gemm_amx_stated(const BaseArgs& args);
// The product of codes: a as round_rows has made it, whatever dtype says, and a quantised weight of kind
// int8, whose scales do not count. inner <= kBaseInt8Terms.
void base_gemm_int8(const BaseArgs& args);
// Of so many terms the sum fits 32 bits: each is at most 127 * 128.
constexpr int64_t kBaseInt8Terms = int64_t{1} << 17;
// Row i of `in` (rows x C), times both scales where they are not null, as codes of 8 bits:
//   row_scale[i] = max |in[i, :]| / 127, codes[i, c] = rint(in[i, c] / row_scale[i]), row_sum[i] = sum_c
//   codes[i, c]
// with zeros from C to ld, a multiple of kCodeAlign. A row with an infinity or a NaN has NaN for a scale.
constexpr int64_t kCodeAlign = 64;
struct RoundRowsArgs {
  ConstMatrix in;
  int64_t rows, C;
  const float *scale, *second;
  int8_t* codes;
  int64_t ld;
  float* row_scale;
  int32_t* row_sum;
  int threads;
};
void round_rows(const RoundRowsArgs& args);
// out[i, j] = W[n + i, k + j], rows x cols, rounded to out's dtype; out's columns are adjacent.
struct DecodePartArgs {
  const Quantised* weight;
  int64_t n, k, rows, cols;
  Matrix out;
  int threads;
};
void decode_part(const DecodePartArgs& args);
// rows <= kBaseFewRows, and w_in or w_out is 1. Scratch: rows * (inner + 32) floats.
void base_few(const BaseArgs& args);
// What base_few takes of bf16 without a scale, where base_gemm_bf16_usable: times a W with w_in == 1, or a
// quantised one whose rows and groups are whole pairs of vectors.
void base_few_bf16(const BaseArgs& args);
// --- end of base product ---

}  // namespace peftkern::cpu
