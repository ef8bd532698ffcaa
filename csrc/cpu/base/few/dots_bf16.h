// Few rows of bf16 times W^T, W quantised, its codes adjacent along the inner dimension: dot products of
// pairs of terms, one pass over the codes.
#pragma once

#include <type_traits>

#include "cpu/base/few/dots.h"
#include "cpu/base/pairs.h"
#include "cpu/operand/in_pairs.h"

#if defined(__AVX512BF16__)

namespace peftkern::cpu::PEFTKERN_LEVEL {

// Terms of a chain, in lanes: a row's bits depend on this alone.
constexpr int64_t kPairChain = 1024;
// Columns whose terms of a chain are decoded at once, into L1, and the distance of their rows there.
constexpr int64_t kPairRun = 8, kPairLd = kPairChain + 32;
// A tile in registers: 20 accumulators. More rows than one has are worth W in memory.
constexpr int kPairTileRows = 5, kPairTileCols = 4;

PEFTKERN_INLINE __m512i load_pairs(const bf16* p) {
  return _mm512_loadu_si512(p);
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

// out[i, j] (+)= a_i . w_j over `terms` terms, of `cols` columns that were decoded.
template <int ROWS>
void pair_dots(const bf16* w, const bf16* a, int64_t lda, int64_t terms, int64_t cols, float* out, int64_t ld,
               bool first) {
  vf acc[ROWS][kPairTileCols];
#pragma GCC unroll 5
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kPairTileCols; ++j) acc[i][j] = zero();
  for (int64_t t = 0; t < terms; t += kPair) {
    __m512i b[kPairTileCols];
#pragma GCC unroll 4
    for (int j = 0; j < kPairTileCols; ++j) b[j] = load_pairs(w + j * kPairLd + t);
#pragma GCC unroll 5
    for (int i = 0; i < ROWS; ++i) {
      const __m512i x = load_pairs(a + i * lda + t);
#pragma GCC unroll 4
      for (int j = 0; j < kPairTileCols; ++j) acc[i][j] = dot_pairs(acc[i][j], x, b[j]);
    }
  }
  add_sums(acc, cols, out, ld, first);
}

// The same straight from codes, of columns from n on and terms from k on.
template <int ROWS, class Form, class Groups>
void code_dots(const Form& form, const Groups& groups, const Quantised& w, int64_t n, const Along& k,
               const bf16* a, int64_t terms, int64_t cols, float* out, int64_t ld) {
  const uint8_t* p[kPairTileCols];
  int64_t group[kPairTileCols], left = 0;
  for (int j = 0; j < kPairTileCols; ++j) {  // the last stands in for those that are not there
    const Place<Form> at(w, n + smaller(j, cols - 1), k);
    p[j] = at.codes, group[j] = at.group, left = at.left;
  }
  const int64_t lda = terms, ahead = Form::bytes(kPairTileCols * w.row);
  vf acc[ROWS][kPairTileCols];
#pragma GCC unroll 5
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kPairTileCols; ++j) acc[i][j] = zero();
  for (int64_t t = 0; t < terms; left = w.group) {
    const int64_t end = smaller(t + left, terms);
    decltype(Form::group(form, groups.of(0))) f[kPairTileCols];
#pragma GCC unroll 4
    for (int j = 0; j < kPairTileCols; ++j) {
      f[j] = Form::group(form, groups.of(group[j]++));
      ask_for_bytes(p[j] + ahead, Form::bytes(end - t));
    }
    for (; t < end; t += kPair, a += kPair)
#pragma GCC unroll 4
      for (int j = 0; j < kPairTileCols; ++j, p[j - 1] += Form::kBytes) {
        const __m512i b = Form::in_bf16(p[j], f[j]);
#pragma GCC unroll 5
        for (int i = 0; i < ROWS; ++i) acc[i][j] = dot_pairs(acc[i][j], load_pairs(a + i * lda), b);
      }
  }
  add_sums(acc, cols, out, ld, k.k == 0);
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

// to[i] = W[n, k + i] for `count` terms, whole pairs, in the order of in_bf16.
template <class Form, class Groups>
void decode_bf16(const Form& form, const Groups& groups, const Quantised& w, int64_t n, const Along& k,
                 int64_t count, bf16* to) {
  Place<Form> at(w, n, k);
  const auto one = [&](const auto& f) __attribute__((always_inline)) {
    _mm512_storeu_si512(to, Form::in_bf16(at.codes, f));
    to += kPair, at.codes += Form::kBytes;
  };
  for (; count > 0; at.left = w.group) {
    const int64_t some = smaller(at.left, count);
    const auto f = Form::group(form, groups.of(at.group++));
    int64_t i = 2 * kPair;  // two at a time: most groups are no longer
    for (; i <= some; i += 2 * kPair) one(f), one(f);
    if (i - kPair <= some) one(f);
    count -= some;
  }
}

// Columns [begin, begin + cols) of the product, at most kPairRun. `a` is packed: chain by chain, in each row
// by row.
template <class Form, class Groups>
void dots_of_columns(const BaseArgs& g, const Form& form, const Groups& groups, int64_t begin, int64_t cols,
                     const bf16* a) {
  alignas(64) bf16 room[kPairRun * kPairLd];
  const Quantised& w = *g.quantised;
  const int64_t n = g.quantised_col + begin;
  float* const out = g.out + begin;
  for (int64_t k = 0; k < g.inner; k += kPairChain) {
    const int64_t terms = smaller(kPairChain, g.inner - k);
    const Along along(w, k);
    if (g.rows <= kPairTileRows) {
      with_rows(g.rows, [&](auto rows) {
        for (int64_t j = 0; j < cols; j += kPairTileCols)
          code_dots<rows.value>(form, groups, w, n + j, along, a, terms, smaller(kPairTileCols, cols - j),
                                out + j, g.ld);
      });
    } else {
      for (int64_t c = 0; c < cols; ++c) {
        decode_bf16(form, groups, w, n + c, along, terms, room + c * kPairLd);
        ask_for_bytes(w.codes + Form::bytes((n + c + kPairRun) * w.row + k), Form::bytes(terms));
      }
      const int64_t tiles = (g.rows + kPairTileRows - 1) / kPairTileRows;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t i = g.rows * t / tiles;
        with_rows(g.rows * (t + 1) / tiles - i, [&](auto rows) {
          for (int64_t j = 0; j < cols; j += kPairTileCols)
            pair_dots<rows.value>(room + j * kPairLd, a + i * terms, terms, terms,
                                  smaller(kPairTileCols, cols - j), out + i * g.ld + j, g.ld, k == 0);
        });
      }
    }
    a += g.rows * terms;
  }
}

// By all threads of a parallel region. K is whole pairs.
template <class Form, class Groups>
void pair_dot_products(const BaseArgs& g, const Form& form, const Groups& groups) {
  auto* packed = reinterpret_cast<bf16*>(g.scratch);
  vs place{};
  for (int i = 0; i < kPair; ++i) place[i] = static_cast<uint16_t>(Form::place(i));
#pragma omp for schedule(static)
  for (int64_t i = 0; i < g.rows; ++i)
    for (int64_t k = 0; k < g.inner; k += kPairChain) {
      const int64_t terms = smaller(kPairChain, g.inner - k);
      bf16* to = packed + k * g.rows + i * terms;
      pack_row(static_cast<const bf16*>(g.a) + i * g.a_row + k * g.a_col, g.a_col, static_cast<int>(terms),
               nullptr, reinterpret_cast<uint32_t*>(to));
      for (int64_t c = 0; c < terms; c += kPair)
        _mm512_storeu_si512(to + c,
                            _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(place), load_pairs(to + c)));
    }
#pragma omp for schedule(guided)
  for (int64_t col = 0; col < g.cols; col += kPairRun)
    dots_of_columns(g, form, groups, col, smaller(kPairRun, g.cols - col), packed);
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL

#endif
