// Few rows of bf16 times W^T, W quantised, its codes adjacent along the inner dimension: dot products of
// pairs of terms as dots_bf16.h has them, straight from codes or of what was decoded into L1, one pass over
// W.
#pragma once

#include "cpu/base/few/dots_bf16.h"
#include "cpu/operand/in_pairs.h"

#if defined(__AVX512BF16__)

namespace peftkern::cpu::PEFTKERN_LEVEL {

// Terms of a chain of kPairRun columns are decoded at once; the distance of their rows in L1.
constexpr int64_t kPairLd = kPairChain + 32;

// pair_dots straight from codes, of columns from n on and terms from k on.
template <int ROWS, class Form, class Groups>
void code_dots(const Form& form, const Groups& groups, const Quantised& w, int64_t n, const Along& k,
               const bf16* a, int64_t terms, int64_t cols, float* out, int64_t ld) {
  Places<Form, kPairTileCols> at(w, n, cols, k);
  const int64_t lda = terms, ahead = Form::bytes(kPairTileCols * w.row);
  vf acc[ROWS][kPairTileCols];
#pragma GCC unroll 5
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kPairTileCols; ++j) acc[i][j] = zero();
  for (int64_t t = 0; t < terms; at.left = w.group) {
    const int64_t end = smaller(t + at.left, terms);
    decltype(Form::group(form, groups.of(0))) f[kPairTileCols];
#pragma GCC unroll 4
    for (int j = 0; j < kPairTileCols; ++j) {
      f[j] = Form::group(form, groups.of(at.group[j]++));
      ask_for_bytes(at.codes[j] + ahead, Form::bytes(end - t));
    }
    for (; t < end; t += kPair, a += kPair)
#pragma GCC unroll 4
      for (int j = 0; j < kPairTileCols; ++j, at.codes[j - 1] += Form::kBytes) {
        const __m512i b = Form::in_bf16(at.codes[j], f[j]);
#pragma GCC unroll 5
        for (int i = 0; i < ROWS; ++i) acc[i][j] = dot_pairs(acc[i][j], load_pairs(a + i * lda), b);
      }
  }
  add_sums(acc, cols, out, ld, k.k == 0);
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
      for_tiles(g.rows, [&](int64_t i, auto rows) {
        for (int64_t j = 0; j < cols; j += kPairTileCols)
          pair_dots<rows.value>(room + j * kPairLd, kPairLd, a + i * terms, terms, terms,
                                smaller(kPairTileCols, cols - j), nullptr, 0, out + i * g.ld + j, g.ld,
                                k == 0);
      });
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
  pack_pairs(
      g, [&](__m512i terms) { return _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(place), terms); },
      packed);
#pragma omp for schedule(guided)
  for (int64_t col = 0; col < g.cols; col += kPairRun)
    dots_of_columns(g, form, groups, col, smaller(kPairRun, g.cols - col), packed);
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL

#endif
