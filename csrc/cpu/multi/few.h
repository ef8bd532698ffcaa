// Few rows of one adapter, as in decoding: its panel is read once, which is what decides the time. A piece of
// it at a time, some ranks side by side; while one piece is worked on the next is asked for, since the
// hardware's own guesses start anew in every page and every row. The operations of each element are those of
// dot and combine (micro.h), in their order.
#pragma once

#include "cpu/multi/turned.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// What comes after ranks [r, r + take) of columns [c, c + cols) of a walk over ranks [r0, r1), all columns.
template <class T>
PEFTKERN_INLINE const T* next_piece(const MultiSegment& s, int64_t r0, int64_t r1, int64_t r, int64_t take,
                                    int64_t c, int64_t cols) {
  return r + take < r1 ? stored_tile<T>(s, r + take, c).data : stored_tile<T>(s, r0, c + cols).data;
}

// dots[m, r - r0] = x[m] . p[r], x (rows, C) in fp32, zeros up to a multiple of kPad; rows <= kFewRows.
template <class T>
static void stream_dots(const MultiSegment& s, int64_t r0, int64_t r1, const float* x, int64_t ldx,
                        int64_t rows, int64_t C, float* room, float* dots) {
  const int64_t R = r1 - r0;
  for (int64_t m = 0; m < rows * R; ++m) dots[m] = 0.0f;
  for (int64_t c0 = 0; c0 < C; c0 += stream_cols(rows)) {
    const int64_t width = min64(stream_cols(rows), C - c0);
    for (int64_t r = r0; r < r1; r += kDotRanks) {
      const int64_t take = min64(kDotRanks, r1 - r);
      const T* next = next_piece<T>(s, r0, r1, r, take, c0, width);
      for (int64_t k = 0; k < width; k += kTileCols) {
        const int64_t c = c0 + k, cols = min64(kTileCols, width - k), n = round_up(cols, kPad);
        if (in_place(s, cols)) {
          const PanelTile<T> p = stored_tile<T>(s, r, c);
          dot<true>(x + c, ldx, rows, p.data, p.ld, n, take, dots + (r - r0), R,
                    k + kTileCols < width ? p.data + kTileCols : next);
        } else {
          pack_panel<T>(s, r, r + take, c, cols, room);
          dot(x + c, ldx, rows, room, kTileLd, n, take, dots + (r - r0), R);
        }
      }
    }
  }
}

// sum[m, c] (+)= sum of v[m, r] * p[r, c] over RANKS ranks, one after the other, for VECTORS vectors of
// columns, n of them whole or in part.
template <int ROWS, int RANKS, int VECTORS, class T>
PEFTKERN_INLINE void add_ranks(const float* v, int64_t ldv, const T* p, int64_t ldp, int n, bool first,
                               float* sum) {
  vf acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) acc[m][j] = first ? zero() : load(sum + m * stream_cols(ROWS) + j * W);
  }
#pragma GCC unroll 4
  for (int r = 0; r < RANKS; ++r) {
    vf ps[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j)
      ps[j] = n >= VECTORS * W ? load(p + r * ldp + j * W) : load_n(p + r * ldp, n);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const vf vs = splat(v[m * ldv + r]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) acc[m][j] = fma(vs, ps[j], acc[m][j]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) store(sum + m * stream_cols(ROWS) + j * W, acc[m][j]);
  }
}

// The same for cols columns; meanwhile asks for the tile after each, and at last for that at `next`.
template <int ROWS, int RANKS, class T>
static void add_piece(const float* v, int64_t ldv, const T* p, const T* next, int64_t ldp, int64_t cols,
                      bool first, float* sum) {
  constexpr int kVectors = 2;
  int64_t c = 0;
  for (int64_t tile = 0; tile < cols; tile += kTileCols) {
    const int64_t end = min64(cols, tile + kTileCols);
    const T* ahead = end < cols ? p + kTileCols : next - tile;
    for (; c + kVectors * W <= end; c += kVectors * W) {
#pragma GCC unroll 4
      for (int r = 0; r < RANKS; ++r) ask_for<kVectors * W>(ahead + r * ldp, c);
      add_ranks<ROWS, RANKS, kVectors>(v, ldv, p + c, ldp, kVectors * W, first, sum + c);
    }
  }
  for (; c < cols; c += W) {
    add_ranks<ROWS, RANKS, 1>(v, ldv, p + c, ldp, static_cast<int>(min64(W, cols - c)), first, sum + c);
  }
}

// sum[m, c - c0] = sum_r v[m, r] * p[r, c] for cols <= stream_cols(ROWS) columns and ROWS rows, that far
// apart. chain: room for as much again.
template <int ROWS, class T>
static void stream_sums(const float* v, int64_t ldv, const MultiSegment& s, int64_t c0, int64_t cols,
                        float* sum, float* chain) {
  for (int64_t start = 0; start < s.R; start += kCombineChain) {
    const int64_t end = min64(s.R, start + kCombineChain);
    float* to = start == 0 ? sum : chain;
    for (int64_t r = start; r < end;) {
      const int64_t take = r + kDotRanks <= end ? kDotRanks : 1;
      const PanelTile<T> p = stored_tile<T>(s, r, c0);
      const T* next = next_piece<T>(s, 0, s.R, r, take, c0, cols);
      if (take == kDotRanks) {
        add_piece<ROWS, kDotRanks>(v + r, ldv, p.data, next, p.ld, cols, r == start, to);
      } else {
        add_piece<ROWS, 1>(v + r, ldv, p.data, next, p.ld, cols, r == start, to);
      }
      r += take;
    }
    for (int64_t m = 0; start > 0 && m < ROWS; ++m) {
      for (int64_t c = m * stream_cols(ROWS); c < m * stream_cols(ROWS) + cols; c += W) {
        store(sum + c, load(sum + c) + load(chain + c));
      }
    }
  }
}

// Whether the sums of few rows can be made as the panel lies.
PEFTKERN_INLINE bool streams(const MultiSegment& s) {
  return s.p.col == 1 || s.p.row == 1;
}

template <int ROWS, class T>
static void few_sums(const float* v, int64_t ldv, const MultiSegment& s, int64_t c0, int64_t cols, float* sum,
                     float* chain) {
  if (s.p.col == 1) return stream_sums<ROWS, T>(v, ldv, s, c0, cols, sum, chain);
  turned_sums<ROWS, T>(v, ldv, s, c0, cols, sum);
}

template <class T>
static void stream_sums(const float* v, int64_t rows, const MultiSegment& s, int64_t c0, int64_t cols,
                        float* sum, float* chain) {
  static_assert(kFewRows == 6);
  switch (rows) {
    case 1:
      return few_sums<1, T>(v, s.R, s, c0, cols, sum, chain);
    case 2:
      return few_sums<2, T>(v, s.R, s, c0, cols, sum, chain);
    case 3:
      return few_sums<3, T>(v, s.R, s, c0, cols, sum, chain);
    case 4:
      return few_sums<4, T>(v, s.R, s, c0, cols, sum, chain);
    case 5:
      return few_sums<5, T>(v, s.R, s, c0, cols, sum, chain);
    case 6:
      return few_sums<6, T>(v, s.R, s, c0, cols, sum, chain);
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
