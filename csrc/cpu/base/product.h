// The base product, block by block: (a * scale) B with a (M x C) and B (C x D), which is W^T in the forward
// pass and W in the input gradient. When a block's product is complete, an epilogue adds the branch, scales
// and bias to it, while it is in cache and before the one rounding to half precision.
#pragma once

#include "cpu/common/kept_scratch.h"
#include "cpu/common/views.h"
#include "peftkern/quantised.h"

namespace peftkern::cpu {

// Who computes it: see peftkern/dispatch/cpu_base.py, which chooses.
enum class BaseKind : int {
  vendor,    // the caller's matrix product, in the output's dtype; of codes after decoding them, part by part
  panels,    // base_gemm, fp32 panels of the result
  bf16,      // base_gemm_bf16, likewise
  amx,       // base_gemm_amx, likewise
  few,       // base_few, likewise
  int8,      // base_gemm_int8 of rows that are rounded to codes, likewise
  identity,  // no product: B is the identity matrix
  given,     // the output holds the product already
};

// In which blocks: the epilogue gets rows x cols at a time. Pure functions of sizes; M, D, C >= 1.
struct BaseBlocks {
  int64_t rows, cols;
  int64_t scratch = 0, panel = 0;  // floats: for the product, and for the block that it fills
};
BaseBlocks base_blocks(BaseKind kind, int64_t M, int64_t D, int64_t C, int threads);

// out (M x D) = a (M x C) b (C x D): one dtype, any strides, out's rows contiguous.
using Product = void (*)(int64_t M, int64_t D, int64_t C, const ConstMatrix& a, const ConstMatrix& b,
                         const Matrix& out);

struct BaseProduct {
  BaseKind kind;
  int64_t M, D, C;
  ConstMatrix a, b;
  const float* scale;  // (C) or null
  Matrix out;          // contents ignored, unless given; written by vendor and given alone
  Product vendor;
  int threads;  // the most it may use
  // In the place of b's memory; its strides say whether B is W^T (1 down a column) or W.
  const Quantised* quantised = nullptr;
};

// Rows of a as codes, for kind int8: `rows` of them, or fewer, from `begin` on. Empty for other kinds.
struct Rounded {
  int64_t begin = 0, rows = 0, ld = 0;
  int8_t* codes = nullptr;
  float* row_scale = nullptr;
  int32_t* row_sum = nullptr;
  // W's scales: of what is rounded, or of the product's columns.
  const float *in = nullptr, *out = nullptr;
};
// Room for as many rows as are worth rounding at once.
Rounded rounded_room(const BaseProduct& g, KeptScratch& scratch);
void round_part(const BaseProduct& g, int threads, const Rounded& to);

// Fills g.out by the caller's product.
void vendor_product(const BaseProduct& g, KeptScratch& scratch);
// One block of another kind, into an fp32 panel of rows ld floats apart.
void fill_panel(const BaseProduct& g, const Rounded& rounded, int threads, int64_t r0, int64_t r1, int64_t c0,
                int64_t c1, float* panel, int64_t ld, float* room);

// epilogue(r0, r1, c0, c1, block): block holds the product of rows [r0, r1) and columns [c0, c1); it is that
// part of g.out, of g.a where the base is the identity, or fp32 scratch. The blocks cover the result once,
// none is empty, c0 is a multiple of 32.
template <class Epilogue>
void base_product(const BaseProduct& g, KeptScratch& scratch, const Epilogue& epilogue) {
  if (g.M == 0 || g.D == 0) return;
  if (g.C == 0 || g.kind == BaseKind::vendor || g.kind == BaseKind::given) {
    if (g.C == 0) {
      zero_rows(g.out, g.M, g.D);
    } else if (g.kind == BaseKind::vendor) {
      vendor_product(g, scratch);
    }
    epilogue(0, g.M, 0, g.D, as_const(g.out));
    return;
  }
  if (g.kind == BaseKind::identity && g.scale == nullptr && g.a.col == 1) {
    epilogue(0, g.M, 0, g.D, g.a);
    return;
  }
  const int threads = worth_threads(g.M * g.C * g.D, g.threads);
  const BaseBlocks blocks = base_blocks(g.kind, g.M, g.D, g.C, threads);
  const int64_t ld =
      blocks.cols + 16;  // not a multiple of 4 KB: a tile's rows would share one set of the cache
  float* panel = scratch.take(blocks.panel);
  float* room = scratch.take(blocks.scratch);
  Rounded rounded = g.kind == BaseKind::int8 ? rounded_room(g, scratch) : Rounded{0, g.M};
  for (; rounded.begin < g.M; rounded.begin += rounded.rows) {
    if (g.kind == BaseKind::int8) round_part(g, threads, rounded);
    const int64_t end = std::min(g.M, rounded.begin + rounded.rows);
    for (int64_t c0 = 0; c0 < g.D; c0 += blocks.cols) {
      const int64_t c1 = std::min(g.D, c0 + blocks.cols);
      for (int64_t r0 = rounded.begin; r0 < end; r0 += blocks.rows) {
        const int64_t r1 = std::min(end, r0 + blocks.rows);
        fill_panel(g, rounded, threads, r0, r1, c0, c1, panel, ld, room);
        epilogue(r0, r1, c0, c1, ConstMatrix{panel, DType::f32, ld, 1});
      }
    }
  }
}

}  // namespace peftkern::cpu
