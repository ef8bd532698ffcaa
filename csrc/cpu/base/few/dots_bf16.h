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
PEFTKERN_INLINE int64_t whole_pairs(int64_t terms) {
  return (terms + kPair - 1) / kPair * kPair;
}

template <int ROWS>
PEFTKERN_INLINE void add_sums(const vf (&acc)[ROWS][kPairTileCols], int64_t cols, float* out, int64_t ld,
                              bool first) {
#pragma GCC unroll 5
  for (int i = 0; i < ROWS; ++i, out += ld) {
    const v4 sums = sum_lanes(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    for (int j = 0; j < cols; ++j) out[j] = first ? sums[j] : out[j] + sums[j];
  }
}

// out[i, j] (+)= a_i . w_j over `terms` terms of `cols` columns, rows of w that lie ldw apart; zeros follow a
// up to whole pairs. Meanwhile so many rows from `next` on are asked for.
template <int ROWS>
void pair_dots(const bf16* w, int64_t ldw, const bf16* a, int64_t lda, int64_t terms, int64_t cols,
               const bf16* next, int64_t asked, float* out, int64_t ld, bool first) {
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
#pragma GCC unroll 5
    for (int i = 0; i < ROWS; ++i) {
      const __m512i x = load_pairs(a + i * lda + t);
#pragma GCC unroll 4
      for (int j = 0; j < kPairTileCols; ++j) acc[i][j] = dot_pairs(acc[i][j], x, b[j]);
    }
  };
  int64_t t = 0;
  for (; t + kPair <= terms; t += kPair) add(t, load_pairs);
  if (t < terms) add(t, [&](const bf16* p) { return load_bf16(p, static_cast<int>(terms - t)); });
  add_sums(acc, cols, out, ld, first);
}

// use(the number of rows of a tile, as a constant)
template <class Use>
PEFTKERN_INLINE void with_rows(int64_t rows, const Use& use) {
  switch (rows) {
    case 1:
      return use(std::integral_constant<int, 1>());
    case 2:
      return use(std::integral_constant<int, 2>());
    case 3:
      return use(std::integral_constant<int, 3>());
    case 4:
      return use(std::integral_constant<int, 4>());
    default:
      return use(std::integral_constant<int, 5>());
  }
}

// use(first row, their number as a constant) for tiles of about as many rows each
template <class Use>
PEFTKERN_INLINE void for_tiles(int64_t rows, const Use& use) {
  const int64_t tiles = (rows + kPairTileRows - 1) / kPairTileRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t i = rows * t / tiles;
    with_rows(rows * (t + 1) / tiles - i, [&](auto count) { use(i, count); });
  }
}

// Columns [begin, begin + cols) of the product, at most kPairRun. `a` is packed: chain by chain, in each row
// by row.
inline void dots_of_columns(const BaseArgs& g, int64_t begin, int64_t cols, const bf16* a) {
  for (int64_t j = 0; j < cols; j += kPairTileCols) {
    const bf16 *w = static_cast<const bf16*>(g.w) + (begin + j) * g.w_out, *x = a;
    for (int64_t k = 0; k < g.inner; k += kPairChain) {
      const int64_t terms = smaller(kPairChain, g.inner - k), lda = whole_pairs(terms);
      // What comes next is asked for little by little, so that no tile has to wait for it.
      const bf16* next = w + (k + kPairChain < g.inner ? k + kPairChain : kPairTileCols * g.w_out);
      for_tiles(g.rows, [&](int64_t i, auto rows) {
        const int64_t ask = kPairTileCols * i / g.rows, end = kPairTileCols * (i + rows.value) / g.rows;
        pair_dots<rows.value>(w + k, g.w_out, x + i * lda, lda, terms, smaller(kPairTileCols, cols - j),
                              next + ask * g.w_out, end - ask, g.out + i * g.ld + begin + j, g.ld, k == 0);
      });
      x += g.rows * lda;
    }
  }
}

// a in bf16, chain by chain, in each row by row, up to whole pairs; in_order(the terms of a pair). By all
// threads of a parallel region.
template <class Order>
void pack_pairs(const BaseArgs& g, const Order& in_order, bf16* packed) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < g.rows; ++i)
    for (int64_t k = 0; k < g.inner; k += kPairChain) {
      const int64_t terms = smaller(kPairChain, g.inner - k), lda = whole_pairs(terms);
      bf16* to = packed + k * g.rows + i * lda;
      std::memset(to + lda - kPair, 0, kPair * sizeof(bf16));
      pack_row(static_cast<const bf16*>(g.a) + i * g.a_row + k * g.a_col, g.a_col, terms, nullptr,
               reinterpret_cast<uint32_t*>(to));
      for (int64_t c = 0; c < lda; c += kPair) _mm512_storeu_si512(to + c, in_order(load_pairs(to + c)));
    }
}

// By all threads of a parallel region.
inline void pair_dot_products(const BaseArgs& g) {
  auto* packed = reinterpret_cast<bf16*>(g.scratch);
  pack_pairs(g, [](__m512i terms) { return terms; }, packed);
  // Guided: a thread's parts follow one another, so that what it asks for is what it visits.
#pragma omp for schedule(guided)
  for (int64_t col = 0; col < g.cols; col += kPairRun)
    dots_of_columns(g, col, smaller(kPairRun, g.cols - col), packed);
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL

#endif
