// The base product of codes of 8 bits with codes of 8 bits, blocked as blocks.h says: sums of integers, which
// are exact, so that all levels give the same bits. They lie in the result's memory until a tile has had its
// last block, and are then scaled:
//
//   out[i, c] = (sum_k a[i, k] B[k, c]) * row_scale[i] * col_scale[c]
//
// Where codes of W have an offset (operand/words.h), it times the sum of the row's codes is taken off first.
// Sums wrap, so the result alone has to fit 32 bits.
#include "cpu/base/blocks.h"
#include "cpu/operand/words.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

// sum + the products of the terms of a and b, lane by lane.
PEFTKERN_INLINE vu add_products(vu sum, vu a, vu b) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<vu>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(b), reinterpret_cast<__m512i>(a)));
#elif defined(__AVX512BW__)
  return sum +
         reinterpret_cast<vu>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return sum +
         reinterpret_cast<vu>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return sum +
         reinterpret_cast<vu>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  const vi x = reinterpret_cast<const vi&>(a), y = reinterpret_cast<const vi&>(b);
  const vi both = (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
  return sum + reinterpret_cast<const vu&>(both);
#endif
}

template <int ROWS>
void tile(int depth, const uint32_t* a, const uint32_t* b, float* out, int64_t ld, bool first) {
  for (int i = 0; i < ROWS; ++i) {
    __builtin_prefetch(out + i * ld, 1);
    __builtin_prefetch(out + i * ld + W, 1);
  }
  vu acc[ROWS][2];
#pragma GCC unroll 14
  for (int i = 0; i < ROWS; ++i) acc[i][0] = acc[i][1] = vu{};
  for (const uint32_t* end = a + depth; a < end; ++a, b += kTileCols) {
    const vu b0 = *reinterpret_cast<const vu_any*>(b), b1 = *reinterpret_cast<const vu_any*>(b + W);
#pragma GCC unroll 14
    for (int i = 0; i < ROWS; ++i) {
      const vu x = splat_u(a[i * kBaseRow]);
      acc[i][0] = add_products(acc[i][0], x, b0);
      acc[i][1] = add_products(acc[i][1], x, b1);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      auto* o = reinterpret_cast<vu_any*>(out + i * ld + half * W);
      *o = first ? acc[i][half] : *o + acc[i][half];
    }
}

struct Integers {
  using Element = uint32_t;
  static constexpr int kTerms = kWordTerms;
#if defined(__AVX512F__)
  static constexpr int kTileRows = 14;
  static constexpr TileFunction<uint32_t> tiles[] = {tile<1>,  tile<2>,  tile<3>,  tile<4>, tile<5>,
                                                     tile<6>,  tile<7>,  tile<8>,  tile<9>, tile<10>,
                                                     tile<11>, tile<12>, tile<13>, tile<14>};
#else
  static constexpr int kTileRows = 6;
  static constexpr TileFunction<uint32_t> tiles[] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
#endif

  static void complete(const BaseArgs& g, int64_t row, int rows, int64_t col, int cols) {
    for (int64_t i = row; i < row + rows; ++i) {
      const vu off = splat_u(kWordOffset * static_cast<uint32_t>(g.row_sum[i]));
      float* to = g.out + i * g.ld + col;
      for (int c = 0; c < cols; c += W) {
        const int n = static_cast<int>(smaller(W, cols - c));
        const vf raw = load_n(to + c, n);
        const vu sum = reinterpret_cast<const vu&>(raw) - off;
        vf x = __builtin_convertvector(reinterpret_cast<const vi&>(sum), vf);
        if (g.col_scale != nullptr) x *= load_n(g.col_scale + col + c, n);  // first: a row's may be large
        store_n(to + c, x * g.row_scale[i], n);
      }
    }
  }
};

}  // namespace

void base_gemm_int8_run(const BaseArgs& args) {
  run_blocks<Integers, Words>(args);
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
