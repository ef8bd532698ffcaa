// Few rows times a quantised W: a part of W that fits L1 is decoded once, and multiplied there as a dense one
// is.
#pragma once

#include "cpu/base/few/dots.h"
#include "cpu/base/few/strips.h"
#include "cpu/operand/dense.h"
#include "cpu/operand/in_pairs.h"
#include "cpu/operand/quantised.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// Rows of what is decoded are not a power of two apart.
constexpr int64_t kDecodedPad = 16;
// Terms of a row that are decoded at a time: those of kDotCols rows, and what they meet, are in L1.
constexpr int64_t kDecodedTerms = 512;
// Codes between what is decoded and what is asked for.
constexpr int64_t kCodesAhead = 16384;

// Columns of a tile of dot products of W in registers: each has its codes, its scale and an accumulator a
// row.
#if defined(__AVX512F__)
constexpr int kPairCols = 4;
#else
constexpr int kPairCols = 2;
#endif

// out[i, j] (+)= a_i . w_j over `terms` terms from k on, of `cols` columns from n on; the bits are those of
// dots on what decode_pairs has made.
template <int ROWS, class Form, class Groups>
void pair_dots(const Form& form, const Groups& groups, const Quantised& w, int64_t n, int64_t cols,
               const Along& k, int64_t terms, const float* a, int64_t lda, float* out, int64_t ld) {
  Places<Form, kPairCols> at(w, n, cols, k);
  const auto& of_rows = form.in_row(w, n);
  const int64_t ahead = Form::bytes(kPairCols * w.row);
  vf acc[ROWS][kPairCols];
#pragma GCC unroll 5
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kPairCols; ++j) acc[i][j] = zero();
  for (int64_t t = 0, left = at.left; t < terms; left = w.group) {
    const int64_t end = smaller(t + left, terms);
    decltype(Form::in_fp32(form, groups.of(0))) f[kPairCols];
    for (int j = 0; j < kPairCols; ++j) {
      f[j] = Form::in_fp32(of_rows, groups.of(at.group[j]++));
      ask_for_bytes(at.codes[j] + ahead, Form::bytes(end - t));
    }
    for (; t < end; t += kPair, a += kPair)
#pragma GCC unroll 4
      for (int j = 0; j < kPairCols; ++j, at.codes[j - 1] += Form::kBytes) {
        vf first, second;
        Form::pair(of_rows, f[j], at.codes[j], first, second);
#pragma GCC unroll 5
        for (int i = 0; i < ROWS; ++i) {
          acc[i][j] = fma(load(a + i * lda), first, acc[i][j]);
          acc[i][j] = fma(load(a + i * lda + W), second, acc[i][j]);
        }
      }
  }
#pragma GCC unroll 5
  for (int i = 0; i < ROWS; ++i) {
    const v4 sums = sum_lanes(acc[i][0], acc[i][1], kPairCols > 2 ? acc[i][2 % kPairCols] : zero(),
                              kPairCols > 2 ? acc[i][3 % kPairCols] : zero());
    float* to = out + i * ld;
    for (int j = 0; j < cols; ++j) to[j] = k.k == 0 ? sums[j] : to[j] + sums[j];
  }
}

template <class Form, class Groups>
void pair_dots(int64_t rows, const Form& form, const Groups& groups, const Quantised& w, int64_t n,
               int64_t cols, const Along& k, int64_t terms, const float* a, int64_t lda, float* out,
               int64_t ld) {
  switch (rows) {
    case 1:
      return pair_dots<1>(form, groups, w, n, cols, k, terms, a, lda, out, ld);
    case 2:
      return pair_dots<2>(form, groups, w, n, cols, k, terms, a, lda, out, ld);
    case 3:
      return pair_dots<3>(form, groups, w, n, cols, k, terms, a, lda, out, ld);
    case 4:
      return pair_dots<4>(form, groups, w, n, cols, k, terms, a, lda, out, ld);
    default:
      return pair_dots<5>(form, groups, w, n, cols, k, terms, a, lda, out, ld);
  }
}
// More rows than these are worth W in memory.
constexpr int64_t kPairRows = 5;

// Columns [begin, end) of the product; of rows of W in one half of it, if halves share bytes.
template <class T>
void dots_of_columns(const BaseArgs& g, const Decoded<T>& of, int64_t begin, int64_t end, float* room) {
  constexpr int64_t kLd = kDecodedTerms + kDecodedPad;
  const Quantised& w = of.weight();
  const int64_t depth = dot_depth(g.rows), parts = (g.rows + kDotGroup - 1) / kDotGroup;
  const int64_t n = of.begin() + begin, cols = end - begin;
  const int64_t early = (kCodesAhead + g.inner - 1) / g.inner;
  for (int64_t k = 0; k < g.inner; k += kDecodedTerms) {
    const int64_t terms = smaller(kDecodedTerms, g.inner - k), block = k / depth * depth;
    const Along along(w, k);
    int64_t lda;
    const auto rows_of_a = [&](int64_t row) {
      return g.scratch + dot_place<Decoded<T>>(g.rows, g.inner, row, block, &lda) + (k - block);
    };
    if (of.pairs() && g.rows <= kPairRows) {
      const float* a = rows_of_a(0);
      with_pairs(w, [&](const auto& form, const auto& groups) {
        for (int64_t j = 0; j < cols; j += kPairCols)
          pair_dots(g.rows, form, groups, w, n + j, smaller(kPairCols, cols - j), along, terms, a, lda,
                    g.out + begin + j, g.ld);
      });
      continue;
    }
    for (int64_t c = 0; c < cols; ++c) ask_for_codes(w, smaller(n + c + early, w.N - 1), k, terms);
    if (of.pairs())
      with_pairs(w, [&](const auto& form, const auto& groups) {
        for (int64_t c = 0; c < cols; ++c) decode_pairs(form, groups, w, n + c, along, terms, room + c * kLd);
      });
    else
      for (int64_t c = 0; c < cols; ++c) decode(w, n + c, k, terms, room + c * kLd);
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t row = g.rows * p / parts, rows = g.rows * (p + 1) / parts - row;
      const float* a = rows_of_a(row);
      dot_block<Dense<float>>(rows, cols, a, lda, room, kLd, terms, 0, g.out + row * g.ld + begin, g.ld,
                              k == 0);
    }
  }
}

// Forward; by all threads of a parallel region, after every row of a was packed.
template <class T>
void dot_products(const BaseArgs& g, const Decoded<T>& w) {
  alignas(64) float room[kDotCols * (kDecodedTerms + kDecodedPad)];
  const int64_t half = w.pairs() ? of_first_half(w.weight(), w.begin(), g.cols) : g.cols;
  for_runs(g.cols, half, kDotCols,
           [&](int64_t col, int64_t cols) { dots_of_columns(g, w, col, col + cols, room); });
}

// Backward, likewise.
template <class T>
void add_strips(const BaseArgs& g, const Decoded<T>& w, const float* a, int64_t lda) {
  using Fp32 = Dense<float>;
  constexpr int64_t kLd = kStripBytes / 4 + kDecodedPad;
  alignas(64) float sums[kStripFloats], room[kSteps * kLd];
  const int64_t width = strip_width<Fp32>(g), ahead = (kCodesAhead + width - 1) / width;
#pragma omp for schedule(dynamic)
  for (int64_t col = 0; col < g.cols; col += width) {
    const int64_t cols = smaller(width, g.cols - col);
    for (int64_t k0 = 0; k0 < g.inner; k0 += kBaseChain) {
      const int64_t end = smaller(g.inner, k0 + kBaseChain);
      for (int64_t i = 0; i < g.rows * width; i += W) store(sums + i, zero());
      for (int64_t k = k0; k < end;) {
        const int64_t steps = end - k < kSteps ? 1 : kSteps;
        for (int64_t s = 0; s < steps; ++s)
          ask_for_codes(w.weight(), smaller(k + s + ahead, g.inner - 1), w.begin() + col, cols);
        for (int64_t s = 0; s < steps; ++s) decode(w.weight(), k + s, w.begin() + col, cols, room + s * kLd);
        if (steps == 1)
          add_strip<Fp32, 1>(g.rows, a + k, lda, room, kLd, cols, sums, width);
        else
          add_strip<Fp32, kSteps>(g.rows, a + k, lda, room, kLd, cols, sums, width);
        k += steps;
      }
      add_to_out<Fp32>(g.rows, cols, sums, width, g.out + col, g.ld, k0 == 0);
    }
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
