// Tiles of products of bf16 on AVX512-BF16: packed elements are pairs of terms that are adjacent along the
// inner dimension, which one instruction multiplies and adds to an fp32 sum.
#pragma once

#include "cpu/base/blocks.h"

#if defined(__AVX512BF16__)

namespace peftkern::cpu::PEFTKERN_LEVEL {

PEFTKERN_INLINE __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// step() for each step of a tile of ROWS rows, which is added to out afterwards. The tile's lines are asked
// for a row a step, some hundred cycles before the end: all at once they are more than a core waits for at a
// time.
template <int ROWS, class Step>
PEFTKERN_INLINE void run_steps(int depth, const float* out, int64_t ld, const Step& step) {
  constexpr int kLead = 448 / ROWS;
  static_assert(kLead >= ROWS, "a row a step");
  const auto ask = [&out, ld]() __attribute__((always_inline)) {
    __builtin_prefetch(out, 1);
    __builtin_prefetch(out + kTileCols - 1, 1);
    out += ld;
  };
  for (int i = depth; i < ROWS; ++i) ask();
  int left = depth;
  for (; left > kLead; --left) step();
  for (const int end = left > ROWS ? left - ROWS : 0; left > end; --left) {
    ask();
    step();
  }
  for (; left > 0; --left) step();
}

template <int ROWS>
void tile(int depth, const uint32_t* a, const uint32_t* b, float* out, int64_t ld, bool first) {
  __m512 acc[ROWS][2];
#pragma GCC unroll 14
  for (int i = 0; i < ROWS; ++i) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
  run_steps<ROWS>(depth, out, ld, [&]() __attribute__((always_inline)) {
    const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + W);
#pragma GCC unroll 14
    for (int i = 0; i < ROWS; ++i) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(a[i * kBaseRow]));
      acc[i][0] = dot_pairs(acc[i][0], x, b0);
      acc[i][1] = dot_pairs(acc[i][1], x, b1);
    }
    ++a, b += kTileCols;
  });
#pragma GCC unroll 14
  for (int i = 0; i < ROWS; ++i) {
    float* o = out + i * ld;
    store(o, first ? acc[i][0] : load(o) + acc[i][0]);
    store(o + W, first ? acc[i][1] : load(o + W) + acc[i][1]);
  }
}

struct Pairs {
  using Element = uint32_t;
  static constexpr int kTerms = 2, kTileRows = 14;
  static constexpr TileFunction<uint32_t> tiles[] = {tile<1>,  tile<2>,  tile<3>,  tile<4>, tile<5>,
                                                     tile<6>,  tile<7>,  tile<8>,  tile<9>, tile<10>,
                                                     tile<11>, tile<12>, tile<13>, tile<14>};
  static void complete(const BaseArgs&, int64_t, int, int64_t, int) {}
};

}  // namespace peftkern::cpu::PEFTKERN_LEVEL

#endif
