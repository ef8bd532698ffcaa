// Few rows of bf16 times W, W adjacent along the output, bf16 as well or quantised: pairs of rows of W are
// laid term beside term, and added to strips of partial sums, one pass over W. An element has the bits that
// base_gemm_bf16 gives it.
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
  const int64_t m = both ? n + 1 : n;
  Place<Form> one(w, n, k), two(w, m, k);
  const auto &form_one = form.in_row(w, n), &form_two = form.in_row(w, m);
  for (int64_t left = one.left; count > 0; left = w.group) {
    const int64_t some = smaller(left, count);
    const auto f = Form::group(form_one, groups.of(one.group++));
    const auto h = Form::group(form_two, groups.of(two.group++));
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

// sums[i][0..kPair) += sum over PAIRS pairs of a[i][.] * b[.]
template <int PAIRS>
PEFTKERN_INLINE void add_held(int64_t rows, const uint32_t* a, int64_t lda, const __m512i (&b)[PAIRS][2],
                              float* sums, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i, sums += ld) {
    vf s0 = load(sums), s1 = load(sums + W);
#pragma GCC unroll 4
    for (int p = 0; p < PAIRS; ++p) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(a[i * lda + p]));
      s0 = dot_pairs(s0, x, b[p][0]), s1 = dot_pairs(s1, x, b[p][1]);
    }
    store(sums, s0), store(sums + W, s1);
  }
}

// The same for `cols` columns of decoded pairs.
template <int PAIRS>
void add_pairs(int64_t rows, const uint32_t* a, int64_t lda, const uint32_t* w, int64_t cols, float* sums,
               int64_t ld) {
  for (int64_t c = 0; c < cols; c += kPair) {
    __m512i b[PAIRS][2];
#pragma GCC unroll 4
    for (int p = 0; p < PAIRS; ++p)
      for (int half = 0; half < 2; ++half) b[p][half] = _mm512_loadu_si512(w + p * kStripLd + c + half * W);
    add_held<PAIRS>(rows, a, lda, b, sums + c, ld);
  }
}

// The same for `cols` columns of `terms` rows of a dense W, 2 PAIRS or one less. What follows below is asked
// for, but only after what lies here was read, as in strips.h.
template <int PAIRS>
void add_dense(int64_t rows, const uint32_t* a, int64_t lda, const bf16* w, int64_t ldw, int64_t terms,
               int64_t cols, float* sums, int64_t ld) {
  for (int64_t c = 0; c < cols; c += kPair) {
    const int n = static_cast<int>(smaller(kPair, cols - c));
    __m512i b[PAIRS][2];
#pragma GCC unroll 4
    for (int p = 0; p < PAIRS; ++p) {
      const bf16* from = w + 2 * p * ldw + c;
      const __m512i x = load_bf16(from, n);
      const __m512i y = 2 * p + 1 < terms ? load_bf16(from + ldw, n) : _mm512_setzero_si512();
      b[p][0] = _mm512_unpacklo_epi16(x, y), b[p][1] = _mm512_unpackhi_epi16(x, y);
    }
    add_held<PAIRS>(rows, a, lda, b, sums + c, ld);
#pragma GCC unroll 8
    for (int s = 0; s < 2 * PAIRS; ++s) ask_for<kPair, 3>(w + (2 * PAIRS + s) * ldw + c);
  }
}

// out[i, 0..cols) (+)= sums[i]; place(element): of which column an element of a pair of rows is.
template <class Place>
void add_strip_to_out(int64_t rows, int64_t cols, const float* sums, int64_t width, const Place& place,
                      float* out, int64_t ld, bool first) {
  vi from[2]{};  // unpacking left columns in fours, turn about
  for (int e = 0; e < W; ++e) {
    const int low = place(e / 4 * 8 + e % 4), high = place(e / 4 * 8 + e % 4 + 4);
    from[low / W][low % W] = e, from[high / W][high % W] = W + e;
  }
  for (int64_t i = 0; i < rows; ++i, sums += width, out += ld)
    for (int64_t c = 0; c < cols; c += kPair) {
      const vf low = load(sums + c), high = load(sums + c + W);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* to = out + c + half * W;
        const vf v = __builtin_shuffle(low, high, from[half]);
        const int64_t left = cols - c - half * W;
        if (left >= W)
          store(to, first ? v : load(to) + v);
        else if (left > 0)
          store_n(to, first ? v : load_n(to, static_cast<int>(left)) + v, static_cast<int>(left));
      }
    }
}

// a in pairs of terms, lda of them apart. By all threads of a parallel region.
inline void pack_strip_rows(const BaseArgs& g, uint32_t* a, int64_t lda) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < g.rows; ++i)
    pack_row(static_cast<const bf16*>(g.a) + i * g.a_row, g.a_col, static_cast<int>(g.inner), nullptr,
             a + i * lda);
}

// By all threads of a parallel region. Columns are whole kPair.
template <class Form, class Groups>
void add_pair_strips(const BaseArgs& g, const Form& form, const Groups& groups) {
  const Quantised& w = *g.quantised;
  auto* a = reinterpret_cast<uint32_t*>(g.scratch);
  const int64_t lda = (g.inner + kPair - 1) / kPair * W;
  pack_strip_rows(g, a, lda);
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
            ask_for_bytes(codes_at<Form>(w, smaller(row + s + ahead, w.N - 1), along.k), Form::bytes(cols));
          decode_two(form, groups, w, row, row + 1 < end, along, cols, room + p * kStripLd);
        }
        if (pairs == 1)
          add_pairs<1>(g.rows, a + n / 2, lda, room, cols, sums, width);
        else
          add_pairs<kStripPairs>(g.rows, a + n / 2, lda, room, cols, sums, width);
        n += 2 * pairs;
      }
      add_strip_to_out(g.rows, cols, sums, width, Form::place, g.out + col, g.ld, k0 == 0);
    }
  }
}

// Likewise, W not quantised, any number of columns.
inline void add_pair_strips(const BaseArgs& g) {
  auto* a = reinterpret_cast<uint32_t*>(g.scratch);
  const int64_t lda = (g.inner + kPair - 1) / kPair * W, width = strip_width<Dense<bf16>>(g);
  pack_strip_rows(g, a, lda);
  alignas(64) float sums[kStripFloats];
#pragma omp for schedule(dynamic)
  for (int64_t col = 0; col < g.cols; col += width) {
    const int64_t cols = smaller(width, g.cols - col);
    const bf16* w = static_cast<const bf16*>(g.w) + col;
    for (int64_t k0 = 0; k0 < g.inner; k0 += 2 * kBaseChain) {
      const int64_t end = smaller(g.inner, k0 + 2 * kBaseChain);
      for (int64_t i = 0; i < g.rows * width; i += W) store(sums + i, zero());
      int64_t n = k0;
      for (; n + 2 * kStripPairs <= end; n += 2 * kStripPairs)
        add_dense<kStripPairs>(g.rows, a + n / 2, lda, w + n * g.w_in, g.w_in, 2 * kStripPairs, cols, sums,
                               width);
      for (; n < end; n += 2)
        add_dense<1>(g.rows, a + n / 2, lda, w + n * g.w_in, g.w_in, end - n, cols, sums, width);
      add_strip_to_out(
          g.rows, cols, sums, width, [](int element) { return element; }, g.out + col, g.ld, k0 == 0);
    }
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL

#endif
