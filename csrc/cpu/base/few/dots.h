// Few rows times W^T, W adjacent along the inner dimension: dot products, one pass over W.
//
// A sum is kept in W lanes over kDotChain terms, then the lanes are added, then the chains in order: a row's
// bits depend on neither the other rows nor the number of threads.
#pragma once

#include "cpu/base/pack.h"
#include "peftkern/cpu.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// Terms of a chain. Shorter ones are more accurate and spend more time on adding lanes.
constexpr int64_t kDotChain = 1024;
// Rows of a that meet a row of W while both are in L1: kDotGroup * kDotChain floats are 32 KB.
constexpr int64_t kDotGroup = 8;
// Groups of kDotCols columns that a thread visits for one part of the inner dimension before the next part.
constexpr int64_t kDotRun = 16;
// Bytes of W between what is multiplied and what is asked for: the latency of memory times the bandwidth of a
// core.
constexpr int64_t kDotAhead = 8192;

#if defined(__AVX512F__)
constexpr int kDotRows = 5, kDotCols = 4;  // 20 accumulators + 4 + 1 of 32 registers
#else
constexpr int kDotRows = 4, kDotCols = 3;  // 12 accumulators + 3 + 1 of 16 registers
#endif

typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));

// Every lane and the one DISTANCE from it. (In a loop over distances GCC makes the order at run time.)
template <int DISTANCE>
PEFTKERN_INLINE vf add_apart(vf x) {
  vi other{};
  for (int i = 0; i < W; ++i) other[i] = (i ^ DISTANCE) % W;
  return x + __builtin_shuffle(x, other);
}

// The sums of the lanes of four vectors.
PEFTKERN_INLINE v4 sum_lanes(vf a, vf b, vf c, vf d) {
  vi low{}, high{}, left{}, right{};
  for (int i = 0; i < W; ++i) {
    low[i] = i / 4 * 4 + i % 4 / 2 + i % 2 * W;
    high[i] = low[i] + 2;
    left[i] = i / 4 * 4 + i % 2 + i % 4 / 2 * W;
    right[i] = left[i] + 2;
  }
  const vf ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  const vf cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, high);
  vf x = __builtin_shuffle(ab, cd, left) + __builtin_shuffle(ab, cd, right);
  if (W > 8) x = add_apart<8>(x);
  if (W > 4) x = add_apart<4>(x);
  v4 sums{};
  for (int i = 0; i < 4; ++i) sums[i] = x[i];
  return sums;
}

// acc[i][j] += a_i . w_j over a pair.
template <class B, int ROWS, int COLS>
PEFTKERN_INLINE void dot_pair(vf (&acc)[ROWS][COLS], const float* a, int64_t lda, typename B::Cursor w,
                              int64_t ldw) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    // Loading W once for both halves would need COLS registers more than there are.
    B::forget(w);
    vf b[COLS];
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) b[j] = half ? B::second(w + j * ldw) : B::first(w + j * ldw);
#pragma GCC unroll 5
    for (int i = 0; i < ROWS; ++i) {
      const vf x = load(a + i * lda + half * W);
#pragma GCC unroll 4
      for (int j = 0; j < COLS; ++j) acc[i][j] = fma(x, b[j], acc[i][j]);
    }
  }
}

// What is left of COLS rows of W after whole steps, n < kLine elements each, with zeros up to a step.
template <class B, int COLS>
struct Rest {
  static constexpr int kParts = B::kLine / kPair;
  typename B::Part parts[COLS][kParts];
  Rest(typename B::Cursor w, int64_t ldw, int64_t n) {
    for (int j = 0; j < COLS; ++j)
      for (int part = 0; part < kParts; ++part)
        parts[j][part].take(w + j * ldw + part * kPair,
                            smaller(kPair, n > part * kPair ? n - part * kPair : 0));
  }
};

// out[i, j] (+)= a_i . w_j over n elements, whole steps, and one step more with `rest`. `ahead` elements
// further on in W lies what is read next; 0: it is in cache already. Nothing else is in this function, or the
// compiler spills accumulators in its loop.
template <class B, int ROWS, int COLS>
void dots(const float* a, int64_t lda, typename B::Cursor w, int64_t ldw, int64_t n, int64_t ahead,
          const Rest<B, COLS>* rest, float* out, int64_t ld, bool first) {
  constexpr int kStep = B::kLine;
  vf acc[ROWS][COLS];
#pragma GCC unroll 5
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) acc[i][j] = zero();
  for (int64_t k = 0; k < n; k += kStep) {
    if (ahead != 0)
#pragma GCC unroll 4
      for (int j = 0; j < COLS; ++j) B::template ask<kStep, 3>(w + j * ldw + k + ahead);
#pragma GCC unroll 4
    for (int part = 0; part < kStep; part += kPair)
      dot_pair<B, ROWS, COLS>(acc, a + k + part, lda, w + k + part, ldw);
  }
  if (rest != nullptr)
    for (int part = 0; part < Rest<B, COLS>::kParts; ++part)
      dot_pair<B, ROWS, COLS>(acc, a + n + part * kPair, lda, rest->parts[0][part].at(), kStep);
#pragma GCC unroll 5
  for (int i = 0; i < ROWS; ++i) {
    float* to = out + i * ld;
    const v4 sums = sum_lanes(acc[i][0], COLS > 1 ? acc[i][1 % COLS] : zero(),
                              COLS > 2 ? acc[i][2 % COLS] : zero(), COLS > 3 ? acc[i][3 % COLS] : zero());
    if (COLS == 4) {
      v4* all = reinterpret_cast<v4*>(to);
      *all = first ? sums : *all + sums;
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < COLS; ++j) to[j] = first ? sums[j] : to[j] + sums[j];
    }
  }
}

template <class B, int COLS>
using DotFunction = void (*)(const float*, int64_t, typename B::Cursor, int64_t, int64_t, int64_t,
                             const Rest<B, COLS>*, float*, int64_t, bool);

// visit(first, number) for runs of at most `run` columns, the first `half` of which have runs of their own. A
// run of those and one of the others in the same place follow one another: they may have codes in the same
// bytes. By all threads of a parallel region. Guided: a thread's runs follow one another, so that what it
// asks for is what it visits.
template <class Visit>
void for_runs(int64_t cols, int64_t half, int64_t run, const Visit& visit) {
  const int64_t other = cols - half, longer = half > other ? half : other;
#pragma omp for schedule(guided)
  for (int64_t col = 0; col < longer; col += run) {
    if (col < half) visit(col, smaller(run, half - col));
    if (col < other) visit(half + col, smaller(run, other - col));
  }
}

// Any n, and any number of rows, spread evenly over tiles of at most kDotRows: 6 are 3 + 3.
template <class B, int COLS>
void dot_rows(int64_t rows, const float* a, int64_t lda, typename B::Cursor w, int64_t ldw, int64_t n,
              int64_t ahead, float* out, int64_t ld, bool first) {
  static constexpr DotFunction<B, COLS> kDots[] = {
      dots<B, 1, COLS>, dots<B, 2, COLS>, dots<B, 3, COLS>, dots<B, 4, COLS>,
#if defined(__AVX512F__)
      dots<B, 5, COLS>,
#endif
  };
  const int64_t tiles = (rows + kDotRows - 1) / kDotRows;
  const auto chain = [&](int64_t k, int64_t whole, const Rest<B, COLS>* rest) {
    for (int64_t t = 0, i = 0; t < tiles; ++t) {
      const int64_t next = rows * (t + 1) / tiles;
      kDots[next - i - 1](a + i * lda + k, lda, w + k, ldw, whole, t == 0 ? ahead : 0, rest, out + i * ld, ld,
                          first && k == 0);
      i = next;
    }
  };
  for (int64_t k = 0; k < n; k += kDotChain) {
    const int64_t terms = smaller(kDotChain, n - k), whole = terms / B::kLine * B::kLine;
    if (whole == terms) {
      chain(k, whole, nullptr);
    } else {
      const Rest<B, COLS> rest(w + k + whole, ldw, terms - whole);
      chain(k, whole, &rest);
    }
  }
}

// A few columns more or less.
template <class B>
void dot_block(int64_t rows, int64_t cols, const float* a, int64_t lda, typename B::Cursor w, int64_t ldw,
               int64_t n, int64_t ahead, float* out, int64_t ld, bool first) {
  if (cols == kDotCols) return dot_rows<B, kDotCols>(rows, a, lda, w, ldw, n, ahead, out, ld, first);
  for (int64_t j = 0; j < cols; ++j) dot_rows<B, 1>(rows, a, lda, w + j * ldw, ldw, n, 0, out + j, ld, first);
}

// Terms of the inner dimension that are visited at a time; a multiple of kDotChain. Few rows leave room in
// L1, and longer runs along a row of W are read faster.
PEFTKERN_INLINE int64_t dot_depth(int64_t rows) {
  return rows < 4 ? 2048 : 1024;
}

// Where row i, term k of the packed a lies: blocks of dot_depth terms one after the other, in each the rows.
template <class B>
PEFTKERN_INLINE int64_t dot_place(int64_t rows, int64_t inner, int64_t i, int64_t k, int64_t* row_floats) {
  *row_floats = (smaller(dot_depth(rows), inner - k) + B::kLine - 1) / B::kLine * B::kLine;
  return k * rows + i * *row_floats;
}

template <class B>
void pack_dot_row(const BaseArgs& g, const B& w, int64_t i) {
  for (int64_t k = 0; k < g.inner; k += dot_depth(g.rows)) {
    const int64_t n = smaller(dot_depth(g.rows), g.inner - k);
    int64_t room;
    float* to = g.scratch + dot_place<B>(g.rows, g.inner, i, k, &room);
    pack_row(static_cast<const typename B::Activation*>(g.a) + i * g.a_row + k * g.a_col, g.a_col, n,
             g.scale ? g.scale + k : nullptr, to);
    for (int64_t c = n; c < room; ++c) to[c] = 0.0f;
    for (int64_t c = 0; c < room; c += kPair) w.to_pair(to + c);
  }
}

// By all threads of a parallel region, after every row was packed.
template <class B>
void dot_products(const BaseArgs& g, const B& w) {
  const int64_t depth = dot_depth(g.rows), deep = (g.inner + depth - 1) / depth;
  const int64_t groups = (g.cols + kDotCols - 1) / kDotCols, parts = (g.rows + kDotGroup - 1) / kDotGroup;
  const int64_t visit = kDotCols * B::bytes(smaller(depth, g.inner)), early = (kDotAhead + visit - 1) / visit;
  // Guided: a thread's runs follow one another, so that what it asks for is what it visits.
#pragma omp for schedule(guided)
  for (int64_t begin = 0; begin < groups; begin += kDotRun) {
    const int64_t size = smaller(groups - begin, kDotRun);
    for (int64_t d = 0; d < deep; ++d)
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t row = g.rows * p / parts, rows = g.rows * (p + 1) / parts - row, k = d * depth;
        int64_t lda;
        const float* a = g.scratch + dot_place<B>(g.rows, g.inner, row, k, &lda);
        for (int64_t group = 0; group < size; ++group) {
          // `early` visits from here: in this run, or in the next.
          int64_t later = d * size + group + early;
          const int64_t next = later < deep * size ? later % size : later - deep * size + size;
          later = later < deep * size ? later / size : 0;
          const int64_t j = (begin + group) * kDotCols, n = smaller(depth, g.inner - k);
          const int64_t ahead = (next - group) * kDotCols * w.out + later * depth - k;
          dot_block<B>(rows, smaller(kDotCols, g.cols - j), a, lda, w.at(j, k), w.out, n, p == 0 ? ahead : 0,
                       g.out + row * g.ld + j, g.ld, k == 0);
        }
      }
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
