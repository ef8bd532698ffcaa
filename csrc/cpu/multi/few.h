// Few rows of one adapter, as in decoding: its panel is read once, row after row as it lies in memory, which
// is what decides the time. The operations of each element are those of dot and combine (micro.h), in their
// order.
#pragma once

#include "cpu/multi/panel.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// Columns of the sums that stay in the first-level cache while rows of the panel pass.
constexpr int64_t kStreamCols = 4096;
// How many bytes ahead a panel's row is asked for: the hardware's own guesses start anew on every page.
constexpr int64_t kStreamAhead = 2048;
// Rows that stream_sums takes, at most.
constexpr int64_t kStreamRows = 2;

// dots[m, r - r0] = x[m] . p[r], x (rows, C) in fp32, zeros up to a multiple of kPad; rows <= kDotRows.
template <class T>
static void stream_dots(const MultiSegment& s, int64_t r0, int64_t r1, const float* x, int64_t ldx,
                        int64_t rows, int64_t C, float* room, float* dots) {
  const int64_t R = r1 - r0, step = rows == 1 ? 1 : 4;
  for (int64_t m = 0; m < rows * R; ++m) dots[m] = 0.0f;
  for (int64_t r = r0; r < r1; r += step) {
    const int64_t take = min64(step, r1 - r);
    for (int64_t c = 0; c < C; c += kTileCols) {
      const int64_t cols = min64(kTileCols, C - c), n = round_up(cols, kPad);
      if (in_place(s, cols)) {
        const PanelTile<T> p = stored_tile<T>(s, r, c);
        for (int64_t k = 0; k < take; ++k) {
          prefetch(reinterpret_cast<const char*>(p.data + k * p.ld) + kStreamAhead,
                   cols * static_cast<int64_t>(sizeof(T)));
        }
        dot(x + c, ldx, rows, p.data, p.ld, n, take, dots + (r - r0), R);
      } else {
        pack_panel<T>(s, r, r + take, c, cols, room);
        dot(x + c, ldx, rows, room, kTileLd, n, take, dots + (r - r0), R);
      }
    }
  }
}

// sum[m, c - c0] (+)= chain of v[m, r] * p[r, c] over r in [r0, r1); a new chain starts from zero.
template <int ROWS, class T>
static void stream_chain(const float* v, int64_t ldv, const MultiSegment& s, int64_t r0, int64_t r1,
                         int64_t c0, int64_t cols, float* sum) {
  for (int64_t r = r0; r < r1; ++r) {
    const T* p = static_cast<const T*>(s.p.data) + r * s.p.row + c0;
    for (int64_t c = 0; c < cols; c += W) {
      __builtin_prefetch(reinterpret_cast<const char*>(p + c) + kStreamAhead, 0, 2);
      const vf ps = c + W <= cols ? load(p + c) : load_n(p + c, static_cast<int>(cols - c));
#pragma GCC unroll 2
      for (int m = 0; m < ROWS; ++m) {
        float* to = sum + m * kStreamCols + c;
        store(to, fma(splat(v[m * ldv + r]), ps, r == r0 ? zero() : load(to)));
      }
    }
  }
}

// sum[m, c - c0] = sum_r v[m, r] * p[r, c] for cols <= kStreamCols columns and ROWS rows, kStreamCols apart.
// chain: room for as much again.
template <int ROWS, class T>
static void stream_sums(const float* v, int64_t ldv, const MultiSegment& s, int64_t c0, int64_t cols,
                        float* sum, float* chain) {
  for (int64_t r = 0; r < s.R; r += kCombineChain) {
    const int64_t end = min64(s.R, r + kCombineChain);
    stream_chain<ROWS, T>(v, ldv, s, r, end, c0, cols, r == 0 ? sum : chain);
    for (int64_t m = 0; r > 0 && m < ROWS; ++m) {
      for (int64_t c = m * kStreamCols; c < m * kStreamCols + cols; c += W) {
        store(sum + c, load(sum + c) + load(chain + c));
      }
    }
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
