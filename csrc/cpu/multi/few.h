// Few rows of one adapter, as in decoding: its panel is read once, which is what decides the time. A piece of
// it at a time, some ranks side by side; while one piece is worked on the next is asked for, since the
// hardware's own guesses start anew in every page and every row. The operations of each element are those of
// dot and combine (micro.h), in their order.
#pragma once

#include <type_traits>

#include "cpu/multi/panel.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// A piece: kDotRanks ranks of so many columns, half a page each. Two pieces and the rows' part fit into a
// first-level cache of 32 KB, and one is more than a core can have on its way.
template <class T>
constexpr int64_t kStreamCols = 2048 / sizeof(T);
constexpr int64_t kStreamColsMost = kStreamCols<bf16>;

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
  for (int64_t c0 = 0; c0 < C; c0 += kStreamCols<T>) {
    const int64_t width = min64(kStreamCols<T>, C - c0);
    for (int64_t r = r0; r < r1; r += kDotRanks) {
      const int64_t take = min64(kDotRanks, r1 - r);
      const T* next = next_piece<T>(s, r0, r1, r, take, c0, width);
      for (int64_t k = 0; k < width; k += kTileCols) {
        const int64_t c = c0 + k, cols = min64(kTileCols, width - k), n = round_up(cols, kPad);
        if (in_place(s, cols)) {
          const PanelTile<T> p = stored_tile<T>(s, r, c);
          dot<true>(x + c, ldx, rows, p.data, p.ld, n, take, dots + (r - r0), R, next + k);
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
    for (int j = 0; j < VECTORS; ++j) acc[m][j] = first ? zero() : load(sum + m * kStreamColsMost + j * W);
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
    for (int j = 0; j < VECTORS; ++j) store(sum + m * kStreamColsMost + j * W, acc[m][j]);
  }
}

// The same for cols columns; meanwhile asks for what lies at `next` as p does.
template <int ROWS, int RANKS, class T>
static void add_piece(const float* v, int64_t ldv, const T* p, const T* next, int64_t ldp, int64_t cols,
                      bool first, float* sum) {
  constexpr int kVectors = 2;
  int64_t c = 0;
  for (; c + kVectors * W <= cols; c += kVectors * W) {
#pragma GCC unroll 4
    for (int r = 0; r < RANKS; ++r) ask_for<kVectors * W>(next + r * ldp, c);
    add_ranks<ROWS, RANKS, kVectors>(v, ldv, p + c, ldp, kVectors * W, first, sum + c);
  }
  for (; c < cols; c += W) {
    add_ranks<ROWS, RANKS, 1>(v, ldv, p + c, ldp, static_cast<int>(min64(W, cols - c)), first, sum + c);
  }
}

// sum[m, c - c0] = sum_r v[m, r] * p[r, c] for cols <= kStreamCols<T> columns and ROWS rows, kStreamColsMost
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
      for (int64_t c = m * kStreamColsMost; c < m * kStreamColsMost + cols; c += W) {
        store(sum + c, load(sum + c) + load(chain + c));
      }
    }
  }
}

// --- panels whose ranks are adjacent, as B of a list of adapters, (N, R): turned in registers ---

// t[r] = ranks [0, depth) of W columns from p on, the first `cols` of them, a column every `ldp` elements.
template <bool WHOLE, class T>
PEFTKERN_INLINE void turned(const T* p, int64_t ldp, int cols, int depth, vf* t) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    t[i] = WHOLE ? load(p + i * ldp) : i < cols ? load_n(p + i * ldp, depth) : zero();
  transpose(t);
}

// The same for a whole square of bf16, as words of two ranks: half the vectors. Each holds columns 2i and
// 2i + 1; with a vector less in each half, log2(W) rounds leave word w of all columns in vector w.
PEFTKERN_INLINE void turned_pairs(const bf16* p, int64_t ldp, vf* t) {
  constexpr int H = W / 2;
  vi low{}, high{};
  for (int i = 0; i < W; ++i) {
    low[i] = (i & 1) * W + i / 2;
    high[i] = low[i] + H;
  }
  vf r[H];
#pragma GCC unroll 8
  for (int i = 0; i < H; ++i) {
    std::memcpy(&r[i], p + 2 * i * ldp, 2 * W);
    std::memcpy(reinterpret_cast<char*>(&r[i]) + 2 * W, p + (2 * i + 1) * ldp, 2 * W);
  }
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    vf next[H];
#pragma GCC unroll 4
    for (int i = 0; i < H / 2; ++i) {
      next[2 * i] = __builtin_shuffle(r[i], r[i + H / 2], low);
      next[2 * i + 1] = __builtin_shuffle(r[i], r[i + H / 2], high);
    }
#pragma GCC unroll 8
    for (int i = 0; i < H; ++i) r[i] = next[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < H; ++i) {
    const vu u = reinterpret_cast<const vu&>(r[i]), even = u << 16, odd = u & 0xffff0000u;
    t[2 * i] = reinterpret_cast<const vf&>(even), t[2 * i + 1] = reinterpret_cast<const vf&>(odd);
  }
}

// Bytes between what is turned and what is asked for.
constexpr int64_t kTurnAhead = 4096;

// As stream_sums, of a panel whose ranks are adjacent.
template <int ROWS, class T>
static void turned_sums(const float* v, int64_t ldv, const MultiSegment& s, int64_t c0, int64_t cols,
                        float* sum) {
  const int64_t ldp = s.p.col;
  const T* p = static_cast<const T*>(s.p.data) + c0 * ldp;
  for (int64_t c = 0; c < cols; c += W, p += W * ldp) {
    const int n = static_cast<int>(min64(W, cols - c));
    for (int64_t b = 0; b < W * s.R * static_cast<int64_t>(sizeof(T)); b += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(p) + kTurnAhead + b, 0, 3);
    vf total[ROWS];
    for (int64_t start = 0; start < s.R; start += kCombineChain) {
      const int64_t end = min64(s.R, start + kCombineChain);
      vf acc[ROWS];
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) acc[m] = zero();
      for (int64_t r = start; r < end; r += W) {
        const int depth = static_cast<int>(min64(W, end - r));
        const auto add = [&](int k, vf t) {
#pragma GCC unroll 8
          for (int m = 0; m < ROWS; ++m) acc[m] = fma(splat(v[m * ldv + r + k]), t, acc[m]);
        };
        vf t[W];
        if (n == W && depth == W) {
          if constexpr (std::is_same<T, bf16>::value) {
            turned_pairs(p + r, ldp, t);
          } else {
            turned<true>(p + r, ldp, W, W, t);
          }
#pragma GCC unroll 16
          for (int k = 0; k < W; ++k) add(k, t[k]);
        } else {
          turned<false>(p + r, ldp, n, depth, t);
          for (int k = 0; k < depth; ++k) add(k, t[k]);
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) total[m] = start == 0 ? acc[m] : total[m] + acc[m];
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) store(sum + m * kStreamColsMost + c, total[m]);
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
