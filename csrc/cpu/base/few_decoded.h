// Few rows times a quantised W: a part of W that fits L1 is decoded once, and multiplied there as a dense one
// is.
#pragma once

#include "cpu/base/dots.h"
#include "cpu/base/strips.h"
#include "cpu/operand/dense.h"
#include "cpu/operand/quantised.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// Rows of what is decoded are not a power of two apart.
constexpr int64_t kDecodedPad = 16;
// Codes between what is decoded and what is asked for.
constexpr int64_t kCodesAhead = 16384;

// Forward; by all threads of a parallel region, after every row of a was packed.
template <class T>
void decoded_dots(const BaseArgs& g, const Decoded<T>& w) {
  using Fp32 = Dense<float>;
  constexpr int64_t kLd = 2048 + kDecodedPad;
  alignas(64) float room[kDotCols * kLd];
  const int64_t depth = dot_depth(g.rows), groups = (g.cols + kDotCols - 1) / kDotCols;
  const int64_t parts = (g.rows + kDotGroup - 1) / kDotGroup;
#pragma omp for schedule(guided)
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t j = group * kDotCols, cols = smaller(kDotCols, g.cols - j);
    for (int64_t k = 0; k < g.inner; k += depth) {
      const int64_t n = smaller(depth, g.inner - k);
      // What follows along a row, or the same of rows further on.
      const int64_t skip = (kCodesAhead + kDotCols * n - 1) / (kDotCols * n), later = k / depth + skip;
      const int64_t deep = (g.inner + depth - 1) / depth;
      const int64_t next = smaller(j + later / deep * kDotCols, g.cols - cols), at = later % deep * depth;
      for (int64_t c = 0; c < cols; ++c)
        ask_for_codes(w.weight(), w.begin() + next + c, at, smaller(depth, g.inner - at));
      for (int64_t c = 0; c < cols; ++c) decode(w.weight(), w.begin() + j + c, k, n, room + c * kLd);
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t row = g.rows * p / parts, rows = g.rows * (p + 1) / parts - row;
        int64_t lda;
        const float* a = g.scratch + dot_place<Decoded<T>>(g.rows, g.inner, row, k, &lda);
        dot_block<Fp32>(rows, cols, a, lda, room, kLd, n, 0, g.out + row * g.ld + j, g.ld, k == 0);
      }
    }
  }
}

// Backward, likewise.
template <class T>
void decoded_strips(const BaseArgs& g, const Decoded<T>& w, const float* a, int64_t lda) {
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
