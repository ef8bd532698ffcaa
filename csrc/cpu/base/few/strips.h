// Few rows times W, W adjacent along the output: rows of W, times elements of a, added to strips of partial
// sums, one pass over W. An element has the bits that base_gemm gives it.
#pragma once

#include "cpu/operand/tile.h"
#include "peftkern/cpu.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// Rows of W held at once, two vectors each; very few rows of a gain nothing from many.
constexpr int kFewSteps = 4;
#if defined(__AVX512F__)
constexpr int kSteps = 8;
#else
constexpr int kSteps = 4;
#endif
// Partial sums of all rows of a: 32 KB.
constexpr int64_t kStripFloats = 8192;
constexpr int64_t kStripAlign = 64;
// Of a row of W: what is asked for must stay in L1 until its turn.
constexpr int64_t kStripBytes = 2048;

// sums[i][0..kPair) += sum over STEPS rows of W of a[i][.] * w[.][0..kPair); sums in the order of a pair.
template <class B, int STEPS>
PEFTKERN_INLINE void add_rows(int64_t rows, const float* a, int64_t lda, typename B::Cursor w, int64_t ldw,
                              float* sums, int64_t ld) {
  vf b[STEPS][2];
#pragma GCC unroll 8
  for (int s = 0; s < STEPS; ++s) {
    b[s][0] = B::first(w + s * ldw);
    b[s][1] = B::second(w + s * ldw);
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* o = sums + i * ld;
    vf s0 = load(o), s1 = load(o + W);
#pragma GCC unroll 8
    for (int s = 0; s < STEPS; ++s) {
      const vf x = splat(a[i * lda + s]);
      s0 = fma(x, b[s][0], s0);
      s1 = fma(x, b[s][1], s1);
    }
    store(o, s0);
    store(o + W, s1);
  }
}

// The same for `cols` columns. What follows below in W is asked for, but only after what lies here was read:
// rows a power of two apart share a set of the cache, which has no room for both.
template <class B, int STEPS>
void add_strip(int64_t rows, const float* a, int64_t lda, typename B::Cursor w, int64_t ldw, int64_t cols,
               float* sums, int64_t ld) {
  constexpr int kLine = B::kLine;
  int64_t c = 0;
  for (; c + kLine <= cols; c += kLine) {
#pragma GCC unroll 4
    for (int part = 0; part < kLine; part += kPair)
      add_rows<B, STEPS>(rows, a, lda, w + c + part, ldw, sums + c + part, ld);
#pragma GCC unroll 8
    for (int s = 0; s < STEPS; ++s) B::template ask<kLine, 3>(w + (STEPS + s) * ldw + c);
  }
  for (; c < cols; c += kPair) {
    typename B::Part parts[STEPS];
    for (int s = 0; s < STEPS; ++s) parts[s].take(w + s * ldw + c, smaller(kPair, cols - c));
    add_rows<B, STEPS>(rows, a, lda, parts[0].at(), kPair, sums + c, ld);
  }
}

// out[i, 0..cols) (+)= sums[i]
template <class B>
void add_to_out(int64_t rows, int64_t cols, const float* sums, int64_t width, float* out, int64_t ld,
                bool first) {
  for (int64_t i = 0; i < rows; ++i, sums += width, out += ld)
    for (int64_t c = 0; c < cols; c += kPair) {
      vf v[2] = {load(sums + c), load(sums + c + W)};
      B::from_pair(v[0], v[1]);
      for (int half = 0; half < 2; ++half) {
        float* to = out + c + half * W;
        const int64_t left = cols - c - half * W;
        if (left >= W)
          store(to, first ? v[half] : load(to) + v[half]);
        else if (left > 0)
          store_n(to, first ? v[half] : load_n(to, static_cast<int>(left)) + v[half], static_cast<int>(left));
      }
    }
}

// out[:, col .. col + cols); cols <= width, the room of a row of sums.
template <class B, int STEPS>
void strip(const BaseArgs& g, const B& base, const float* a, int64_t lda, int64_t col, int64_t cols,
           int64_t width) {
  alignas(64) float sums[kStripFloats];
  const typename B::Cursor w = base.at(col, 0);
  for (int64_t k0 = 0; k0 < g.inner; k0 += kBaseChain) {
    const int64_t end = smaller(g.inner, k0 + kBaseChain);
    for (int64_t i = 0; i < g.rows * width; i += W) store(sums + i, zero());
    int64_t k = k0;
    for (; k + STEPS <= end; k += STEPS)
      add_strip<B, STEPS>(g.rows, a + k, lda, w + k * base.in, base.in, cols, sums, width);
    for (; k < end; ++k) add_strip<B, 1>(g.rows, a + k, lda, w + k * base.in, base.in, cols, sums, width);
    add_to_out<B>(g.rows, cols, sums, width, g.out + col, g.ld, k0 == 0);
  }
}

// Columns of a strip: all alike, as wide as L1 allows, at least one per thread. The width does not change any
// bits.
template <class B>
int64_t strip_width(const BaseArgs& g) {
  int64_t most = smaller(kStripFloats / g.rows / kStripAlign * kStripAlign, B::elements(kStripBytes));
  most = smaller(most, (g.cols / g.threads / kStripAlign + 1) * kStripAlign);
  const int64_t strips = (g.cols + most - 1) / most, share = (g.cols + strips - 1) / strips;
  return (share + kStripAlign - 1) / kStripAlign * kStripAlign;
}

// By all threads of a parallel region, after every row of a was packed.
template <class B>
void add_strips(const BaseArgs& g, const B& base, const float* a, int64_t lda) {
  const int64_t width = strip_width<B>(g);
#pragma omp for schedule(dynamic)
  for (int64_t col = 0; col < g.cols; col += width) {
    const int64_t cols = smaller(width, g.cols - col);
    if (g.rows <= kFewSteps)
      strip<B, kFewSteps>(g, base, a, lda, col, cols, width);
    else
      strip<B, kSteps>(g, base, a, lda, col, cols, width);
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
