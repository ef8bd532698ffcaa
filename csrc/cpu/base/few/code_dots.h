// Few rows of bf16 times W^T, W quantised, its codes adjacent along the inner dimension: dot products of
// pairs of terms as dots_bf16.h has them, of up to kCodeTileRows rows straight from codes, of more rows of
// what was decoded into L1.
#pragma once

#include "cpu/base/few/dots_bf16.h"
#include "cpu/base/few/readers.h"

#if defined(__AVX512BF16__)

namespace peftkern::cpu::PEFTKERN_LEVEL {

// A tile in registers: four columns, or of more rows two. Terms of a chain of the most rows are half of L1.
constexpr int kCodeTileRows = 8, kCodeWideRows = 5;
template <int ROWS>
constexpr int kCodeTileCols = ROWS > kCodeWideRows ? 2 : 4;

// Columns of a thread's part. The rows of a wide tile are quick to read again: its columns are read to their
// ends, as memory has them. Of more rows many columns meet a chain's terms while those are in L1. And the
// most columns between what is multiplied and what is asked for.
constexpr int64_t kCodeRun = 32, kCodesEarly = 8;
// Of more rows a chain of kPairRun columns is decoded into L1, their rows so far apart.
constexpr int64_t kDecodedLd = kPairChain + kPair;

// out[i, j] (+)= a_i . w_j over `terms` terms from k on of `cols` columns from n on. What lies `ahead` bytes
// further on is asked for.
template <int ROWS, class Reader>
void code_dots(const Reader& reader, const Quantised& w, int64_t n, const Along& k, const bf16* a,
               int64_t terms, int64_t cols, int64_t ahead, float* out, int64_t ld) {
  constexpr int COLS = kCodeTileCols<ROWS>;
  const Places<typename Reader::Codes, COLS> at(w, n, cols, k);
  vf acc[ROWS][COLS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) acc[i][j] = zero();
  const auto add = [&](const __m512i(&b)[COLS]) __attribute__((always_inline)) {
    add_pairs(a, b, acc);
    a += ROWS * kPair;
  };
  Reader::read(reader, at, terms, ahead, add);
  add_sums(acc, cols, out, ld, k.k == 0);
}

// to[j] = the terms from k on of column n + j, kDecodedLd apart, in the order of the reader
template <class Reader>
void decode_columns(const Reader& reader, const Quantised& w, int64_t n, const Along& k, int64_t terms,
                    int64_t cols, int64_t ahead, bf16* to) {
  const Places<typename Reader::Codes, kPairTileCols> at(w, n, cols, k);
  Reader::read(reader, at, terms, ahead,
               [&](const __m512i(&b)[kPairTileCols]) __attribute__((always_inline)) {
#pragma GCC unroll 4
                 for (int j = 0; j < kPairTileCols; ++j) _mm512_storeu_si512(to + j * kDecodedLd, b[j]);
                 to += kPair;
               });
}

// Columns [begin, begin + cols) of the product, at most kCodeRun, or of more than kCodeTileRows rows
// kPairRun; of rows of W in one half of it, if halves share bytes.
template <class Reader>
void dots_of_columns(const BaseArgs& g, const Reader& reader, int64_t begin, int64_t cols, const bf16* a) {
  alignas(64) bf16 room[kPairRun * kDecodedLd];
  const Quantised& w = *g.quantised;
  for (int64_t k = 0; k < g.inner; k += kPairChain) {
    const int64_t terms = smaller(kPairChain, g.inner - k);
    const int64_t whole = whole_blocks(terms, Reader::kVectors * kPair), n = g.quantised_col + begin;
    const Along along(w, k);
    // From the last columns of a chain to the first ones of the next, or of the next run.
    const int64_t turn = k + kPairChain < g.inner ? kPairChain - cols * w.row : -k;
    const auto ahead = [&](int64_t j) {
      if (Reader::Codes::kHalves) return Reader::Codes::bytes(cols * w.row);  // the next run
      const int64_t early = smaller(kCodesEarly, cols);
      return Reader::Codes::bytes(early * w.row + (j + early < cols ? 0 : turn));
    };
    if (g.rows <= kCodeTileRows) {
      with_rows<kCodeTileRows>(g.rows, [&](auto rows) {
        constexpr int64_t kCols = kCodeTileCols<rows.value>;
        for (int64_t j = 0; j < cols; j += kCols)
          code_dots<rows.value>(reader, w, n + j, along, a, terms, smaller(kCols, cols - j), ahead(j),
                                g.out + begin + j, g.ld);
      });
    } else {
      for (int64_t j = 0; j < cols; j += kPairTileCols)
        decode_columns(reader, w, n + j, along, terms, smaller(kPairTileCols, cols - j), ahead(j),
                       room + j * kDecodedLd);
      for_tiles<kPairTileRows>(g.rows, [&](int64_t i, auto rows) {
        for (int64_t j = 0; j < cols; j += kPairTileCols)
          pair_dots<rows.value>(room + j * kDecodedLd, kDecodedLd, a + i * whole, whole,
                                smaller(kPairTileCols, cols - j), nullptr, 0, g.out + i * g.ld + begin + j,
                                g.ld, k == 0);
      });
    }
    a += g.rows * whole;
  }
}

// By all threads of a parallel region. K is whole pairs.
template <class Reader>
void pair_dot_products(const BaseArgs& g, const Reader& reader) {
  auto* packed = reinterpret_cast<bf16*>(g.scratch);
  const bool direct = g.rows <= kCodeTileRows;
  pack_pairs(g, direct ? kCodeTileRows : kPairTileRows, reader, packed);
  int64_t run = kPairRun;
  if (g.rows <= kCodeWideRows)
    run = kCodeTileCols<kCodeWideRows>;
  else if (direct && !Reader::Codes::kHalves && g.cols >= 4 * kCodeRun * g.threads)  // enough for all
    run = kCodeRun;
  const Quantised& w = *g.quantised;
  for_runs(g.cols, of_first_half(w, g.quantised_col, g.cols), run, [&](int64_t col, int64_t cols) {
    const Reader of_rows{reader.form.in_row(w, g.quantised_col + col), reader.groups};
    dots_of_columns(g, of_rows, col, cols, packed);
  });
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL

#endif
