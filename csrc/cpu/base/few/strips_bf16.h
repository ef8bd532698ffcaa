// Few rows of bf16 times W, W quantised, its codes adjacent along the output: pairs of rows of W are decoded
// term beside term, and added to strips of partial sums, one pass over the codes. An element has the bits
// that base_gemm_bf16 gives it.
#pragma once

#include "cpu/base/few/strips.h"
#include "cpu/base/pairs.h"
#include "cpu/operand/dense.h"
#include "cpu/operand/in_pairs.h"

#if defined(__AVX512BF16__)

namespace peftkern::cpu::PEFTKERN_LEVEL {

// Pairs of rows of W that are held at once, and the distance of decoded ones.
constexpr int kStripPairs = 4;
constexpr int64_t kStripLd = kStripBytes / 4 + 16;
// Codes between what is decoded and what is asked for.
constexpr int64_t kStripAhead = 16384;

// to[c] = (W[n, k + c], W[n + 1, k + c]) for `count` columns, whole kPair; of the last row alone: (.., 0).
template <class Form, class Groups>
void decode_two(const Form& form, const Groups& groups, const Quantised& w, int64_t n, bool both,
                const Along& k, int64_t count, uint32_t* to) {
  Place<Form> one(w, n, k), two(w, both ? n + 1 : n, k);
  for (int64_t left = one.left; count > 0; left = w.group) {
    const int64_t some = smaller(left, count);
    const auto f = Form::group(form, groups.of(one.group++)), h = Form::group(form, groups.of(two.group++));
    for (const uint32_t* end = to + some; to < end; to += kPair) {
      const __m512i x = Form::in_bf16(one.codes, f);
      const __m512i y = both ? Form::in_bf16(two.codes, h) : _mm512_setzero_si512();
      _mm512_storeu_si512(to, _mm512_unpacklo_epi16(x, y));
      _mm512_storeu_si512(to + W, _mm512_unpackhi_epi16(x, y));
      one.codes += Form::kBytes, two.codes += Form::kBytes;
    }
    count -= some;
  }
}

// sums[i][0..cols) += sum over PAIRS pairs of a[i][.] * w[.][0..cols)
template <int PAIRS>
void add_pairs(int64_t rows, const uint32_t* a, int64_t lda, const uint32_t* w, int64_t cols, float* sums,
               int64_t ld) {
  for (int64_t c = 0; c < cols; c += kPair) {
    __m512i b[PAIRS][2];
#pragma GCC unroll 4
    for (int p = 0; p < PAIRS; ++p)
      for (int half = 0; half < 2; ++half) b[p][half] = _mm512_loadu_si512(w + p * kStripLd + c + half * W);
    for (int64_t i = 0; i < rows; ++i) {
      float* o = sums + i * ld + c;
      vf s0 = load(o), s1 = load(o + W);
#pragma GCC unroll 4
      for (int p = 0; p < PAIRS; ++p) {
        const __m512i x = _mm512_set1_epi32(static_cast<int>(a[i * lda + p]));
        s0 = dot_pairs(s0, x, b[p][0]), s1 = dot_pairs(s1, x, b[p][1]);
      }
      store(o, s0), store(o + W, s1);
    }
  }
}

// out[i, 0..cols) (+)= sums[i]
template <class Form>
void add_strip_to_out(int64_t rows, int64_t cols, const float* sums, int64_t width, float* out, int64_t ld,
                      bool first) {
  vi from[2]{};  // unpacking left columns in fours, turn about
  for (int e = 0; e < W; ++e) {
    const int low = Form::place(e / 4 * 8 + e % 4), high = Form::place(e / 4 * 8 + e % 4 + 4);
    from[low / W][low % W] = e, from[high / W][high % W] = W + e;
  }
  for (int64_t i = 0; i < rows; ++i, sums += width, out += ld)
    for (int64_t c = 0; c < cols; c += kPair) {
      const vf low = load(sums + c), high = load(sums + c + W);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* to = out + c + half * W;
        const vf v = __builtin_shuffle(low, high, from[half]);
        store(to, first ? v : load(to) + v);
      }
    }
}

// By all threads of a parallel region. Columns are whole kPair.
template <class Form, class Groups>
void add_pair_strips(const BaseArgs& g, const Form& form, const Groups& groups) {
  const Quantised& w = *g.quantised;
  auto* a = reinterpret_cast<uint32_t*>(g.scratch);
  const int64_t lda = (g.inner + kPair - 1) / kPair * W;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < g.rows; ++i)
    pack_row(static_cast<const bf16*>(g.a) + i * g.a_row, g.a_col, static_cast<int>(g.inner), nullptr,
             a + i * lda);
  alignas(64) float sums[kStripFloats];
  alignas(64) uint32_t room[kStripPairs * kStripLd];
  const int64_t width = strip_width<Dense<float>>(g), ahead = (kStripAhead + width - 1) / width;
#pragma omp for schedule(dynamic)
  for (int64_t col = 0; col < g.cols; col += width) {
    const int64_t cols = smaller(width, g.cols - col);
    const Along along(w, g.quantised_col + col);
    for (int64_t k0 = 0; k0 < g.inner; k0 += 2 * kBaseChain) {
      const int64_t end = smaller(g.inner, k0 + 2 * kBaseChain);
      for (int64_t i = 0; i < g.rows * width; i += W) store(sums + i, zero());
      for (int64_t n = k0; n < end;) {
        const int64_t pairs = end - n < 2 * kStripPairs ? 1 : kStripPairs;
        for (int64_t p = 0; p < pairs; ++p) {
          const int64_t row = n + 2 * p;
          for (int64_t s = 0; s < 2; ++s)
            ask_for_bytes(w.codes + Form::bytes(smaller(row + s + ahead, w.N - 1) * w.row + along.k),
                          Form::bytes(cols));
          decode_two(form, groups, w, row, row + 1 < end, along, cols, room + p * kStripLd);
        }
        if (pairs == 1)
          add_pairs<1>(g.rows, a + n / 2, lda, room, cols, sums, width);
        else
          add_pairs<kStripPairs>(g.rows, a + n / 2, lda, room, cols, sums, width);
        n += 2 * pairs;
      }
      add_strip_to_out<Form>(g.rows, cols, sums, width, g.out + col, g.ld, k0 == 0);
    }
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL

#endif
