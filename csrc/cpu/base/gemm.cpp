// The base product in fp32 from fp32, bf16 or fp16 operands: out = (a * scale) B, blocked as blocks.h
// says. Both operands are packed as fp32, tiles of kTileRows x kTileCols are accumulated in registers.
//
// An element's sum is a chain of fused multiply-adds over at most kBaseChain terms, the chains added in
// order. It depends on the inner dimension alone, so a row has the same bits in any batch, with any number of
// threads.
#include "cpu/base/blocks.h"
#include "cpu/operand/dense.h"
#include "cpu/operand/quantised.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

static_assert(kTileCols <= kBaseTileCols, "scratch is sized for the widest level");

template <int ROWS>
void tile(int depth, const float* a, const float* b, float* out, int64_t ld, bool first) {
  for (int i = 0; i < ROWS; ++i) {
    __builtin_prefetch(out + i * ld, 1);
    __builtin_prefetch(out + i * ld + W, 1);
  }
  vf acc[ROWS][2];
#pragma GCC unroll 14
  for (int i = 0; i < ROWS; ++i) acc[i][0] = acc[i][1] = zero();
  for (const float* end = a + depth; a < end; ++a, b += kTileCols) {
    const vf b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 14
    for (int i = 0; i < ROWS; ++i) {
      const vf x = splat(a[i * kBaseRow]);
      acc[i][0] = fma(x, b0, acc[i][0]);
      acc[i][1] = fma(x, b1, acc[i][1]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < ROWS; ++i) {
    float* o = out + i * ld;
    store(o, first ? acc[i][0] : load(o) + acc[i][0]);
    store(o + W, first ? acc[i][1] : load(o + W) + acc[i][1]);
  }
}

struct Fp32 {
  using Element = float;
  static constexpr int kTerms = 1;
  // 14 x 2 accumulators fill the 32 registers of AVX-512, 6 x 2 the 16 of the other levels.
#if defined(__AVX512F__)
  static constexpr int kTileRows = 14;
  static constexpr TileFunction<float> tiles[] = {tile<1>,  tile<2>,  tile<3>,  tile<4>, tile<5>,
                                                  tile<6>,  tile<7>,  tile<8>,  tile<9>, tile<10>,
                                                  tile<11>, tile<12>, tile<13>, tile<14>};
#else
  static constexpr int kTileRows = 6;
  static constexpr TileFunction<float> tiles[] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
#endif
  static void complete(const BaseArgs&, int64_t, int, int64_t, int) {}
};

template <class T>
void run(const BaseArgs& g) {
  g.quantised != nullptr ? run_blocks<Fp32, Decoded<T>>(g) : run_blocks<Fp32, Dense<T>>(g);
}

}  // namespace

void base_gemm(const BaseArgs& args) {
  switch (args.dtype) {
    case DType::f32:
      return run<float>(args);
    case DType::bf16:
      return run<bf16>(args);
    case DType::f16:
      return run<f16>(args);
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
