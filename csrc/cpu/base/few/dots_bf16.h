// Few rows of bf16 times W^T, W adjacent along the inner dimension and bf16 as well: dot products of pairs of
// terms, one pass over W. code_dots.h has those of a quantised W.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/base/few/dots.h"
#include "cpu/base/pairs.h"

#if defined(__AVX512BF16__)

namespace peftkern::cpu::PEFTKERN_LEVEL {

// Terms of a chain, in lanes: a row's bits depend on this alone.
constexpr int64_t kPairChain = 1024;
// Columns of a thread's part.
constexpr int64_t kPairRun = 8;
// A tile in registers: 20 accumulators. More rows than one has are worth W in memory.
constexpr int kPairTileRows = 5, kPairTileCols = 4;

PEFTKERN_INLINE __m512i load_pairs(const bf16* p) {
  return _mm512_loadu_si512(p);
}
PEFTKERN_INLINE int64_t whole_blocks(int64_t terms, int64_t block) {
  return (terms + block - 1) / block * block;
}

// acc[i][j] += a_i . b_j over a pair of vectors
template <int ROWS, int COLS>
PEFTKERN_INLINE void add_pairs(const bf16* a, const __m512i (&b)[COLS], vf (&acc)[ROWS][COLS]) {
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i) {
    const __m512i x = load_pairs(a + i * kPair);
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) acc[i][j] = dot_pairs(acc[i][j], x, b[j]);
  }
}

// out[i, j] (+)= the sum of the lanes of acc[i][j], j < cols
template <int ROWS>
PEFTKERN_INLINE void add_sums(const vf (&acc)[ROWS][4], int64_t cols, float* out, int64_t ld, bool first) {
  const auto there = static_cast<__mmask8>((1 << cols) - 1), before = first ? __mmask8{0} : there;
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i, out += ld) {
    const v4 sums = sum_lanes(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    _mm_mask_storeu_ps(out, there, sums + _mm_maskz_loadu_ps(before, out));
  }
}
template <int ROWS>
PEFTKERN_INLINE void add_sums(const vf (&acc)[ROWS][2], int64_t cols, float* out, int64_t ld, bool first) {
  const auto there = static_cast<__mmask8>((1 << cols) - 1), before = first ? __mmask8{0} : there;
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; i += 2, out += 2 * ld) {
    const bool two = i + 1 < ROWS;
    const v4 sums = sum_lanes(acc[i][0], acc[i][1], two ? acc[(i + 1) % ROWS][0] : zero(),
                              two ? acc[(i + 1) % ROWS][1] : zero());
    _mm_mask_storeu_ps(out, there, sums + _mm_maskz_loadu_ps(before, out));
    if (two)
      _mm_mask_storeu_ps(out + ld, there, _mm_movehl_ps(sums, sums) + _mm_maskz_loadu_ps(before, out + ld));
  }
}

// out[i, j] (+)= a_i . w_j over `terms` terms of `cols` columns, rows of w that lie ldw apart; a is packed,
// with zeros up to whole pairs. Meanwhile so many rows from `next` on are asked for.
template <int ROWS>
void pair_dots(const bf16* w, int64_t ldw, const bf16* a, int64_t terms, int64_t cols, const bf16* next,
               int64_t asked, float* out, int64_t ld, bool first) {
  const bf16* row[kPairTileCols];
  for (int j = 0; j < kPairTileCols; ++j)  // the last stands in for those that are not there
    row[j] = w + smaller(j, cols - 1) * ldw;
  vf acc[ROWS][kPairTileCols];
#pragma GCC unroll 5
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kPairTileCols; ++j) acc[i][j] = zero();
  const auto add = [&](int64_t t, const auto& read) __attribute__((always_inline)) {
    __m512i b[kPairTileCols];
#pragma GCC unroll 4
    for (int j = 0; j < kPairTileCols; ++j) b[j] = read(row[j] + t);
    for (int64_t j = 0; j < asked; ++j) __builtin_prefetch(next + j * ldw + t);
    add_pairs(a + ROWS * t, b, acc);
  };
  int64_t t = 0;
  for (; t + kPair <= terms; t += kPair) add(t, load_pairs);
  if (t < terms) add(t, [&](const bf16* p) { return load_bf16(p, static_cast<int>(terms - t)); });
  add_sums(acc, cols, out, ld, first);
}

// use(rows, as a constant), of at most MOST
template <int MOST, class Use>
PEFTKERN_INLINE void with_rows(int64_t rows, const Use& use) {
  if constexpr (MOST > 1)
    if (rows < MOST) return with_rows<MOST - 1>(rows, use);
  use(std::integral_constant<int, MOST>());
}

// Rows are cut into tiles of about as many each, at most `most`: the first one's of tile t.
PEFTKERN_INLINE int64_t tile_row(int64_t rows, int64_t most, int64_t t) {
  const int64_t tiles = (rows + most - 1) / most;
  return rows * t / tiles;
}

// use(first row, their number as a constant) for tiles of at most MOST rows
template <int MOST, class Use>
PEFTKERN_INLINE void for_tiles(int64_t rows, const Use& use) {
  for (int64_t t = 0, i = 0; i < rows; ++t) {
    const int64_t next = tile_row(rows, MOST, t + 1);
    with_rows<MOST>(next - i, [&](auto count) { use(i, count); });
    i = next;
  }
}

// Columns [begin, begin + cols) of the product, at most kPairRun.
inline void dots_of_columns(const BaseArgs& g, int64_t begin, int64_t cols, const bf16* a) {
  for (int64_t j = 0; j < cols; j += kPairTileCols) {
    const bf16 *w = static_cast<const bf16*>(g.w) + (begin + j) * g.w_out, *x = a;
    for (int64_t k = 0; k < g.inner; k += kPairChain) {
      const int64_t terms = smaller(kPairChain, g.inner - k), lda = whole_blocks(terms, kPair);
      // What comes next is asked for little by little, so that no tile has to wait for it.
      const bf16* next = w + (k + kPairChain < g.inner ? k + kPairChain : kPairTileCols * g.w_out);
      for_tiles<kPairTileRows>(g.rows, [&](int64_t i, auto rows) {
        const int64_t ask = kPairTileCols * i / g.rows, end = kPairTileCols * (i + rows.value) / g.rows;
        pair_dots<rows.value>(w + k, g.w_out, x + i * lda, terms, smaller(kPairTileCols, cols - j),
                              next + ask * g.w_out, end - ask, g.out + i * g.ld + begin + j, g.ld, k == 0);
      });
      x += g.rows * lda;
    }
  }
}

// a in bf16: chain by chain, in each tile by tile of at most `most` rows, in each vector by vector, in each
// row by row: rows a power of two apart would share a few sets of L1. Up to whole Order::kVectors there are
// zeros; in_order gives these their order. By all threads of a parallel region.
template <class Order>
void pack_pairs(const BaseArgs& g, int64_t most, const Order& in_order, bf16* packed) {
  constexpr int64_t kBlock = Order::kVectors * kPair;
  alignas(64) bf16 row[kPairChain];
  __m512i block[Order::kVectors];
#pragma omp for schedule(static)
  for (int64_t i = 0; i < g.rows; ++i) {
    int64_t begin = 0, end = 0;
    for (int64_t t = 1; end <= i; ++t) begin = end, end = tile_row(g.rows, most, t);
    for (int64_t k = 0; k < g.inner; k += kPairChain) {
      const int64_t terms = smaller(kPairChain, g.inner - k), whole = whole_blocks(terms, kBlock);
      std::memset(row + whole - kBlock, 0, kBlock * sizeof(bf16));
      pack_row(static_cast<const bf16*>(g.a) + i * g.a_row + k * g.a_col, g.a_col, terms, nullptr,
               reinterpret_cast<uint32_t*>(row));
      bf16* to = packed + k * g.rows + begin * whole + (i - begin) * kPair;
      for (int64_t c = 0; c < whole; c += kBlock) {
        in_order(row + c, block);
        for (int v = 0; v < Order::kVectors; ++v, to += (end - begin) * kPair)
          _mm512_storeu_si512(to, block[v]);
      }
    }
  }
}

struct InPlace {
  static constexpr int kVectors = 1;
  void operator()(const bf16* row, __m512i* to) const { *to = load_pairs(row); }
};

// By all threads of a parallel region.
inline void pair_dot_products(const BaseArgs& g) {
  auto* packed = reinterpret_cast<bf16*>(g.scratch);
  pack_pairs(g, kPairTileRows, InPlace(), packed);
  // Guided: a thread's parts follow one another, so that what it asks for is what it visits.
#pragma omp for schedule(guided)
  for (int64_t col = 0; col < g.cols; col += kPairRun)
    dots_of_columns(g, col, smaller(kPairRun, g.cols - col), packed);
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL

#endif
