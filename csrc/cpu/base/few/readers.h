// How few rows of bf16 read the codes of a tile of columns: vectors of bf16 in registers, with what meets
// them in the same order (kVectors vectors at a time; as an order of pack_pairs).
#pragma once

#include "cpu/operand/in_pairs.h"

#if defined(__AVX512BF16__)

namespace peftkern::cpu::PEFTKERN_LEVEL {

// A pair of vectors at a time, of any form.
template <class Form, class Groups>
struct PairReader {
  using Codes = Form;
  static constexpr int kVectors = 1;
  Form form;
  Groups groups;

  void operator()(const bf16* row, __m512i* to) const {
    vs place{};
    for (int i = 0; i < kPair; ++i) place[i] = static_cast<uint16_t>(Form::place(i));
    *to = _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(place), _mm512_loadu_si512(row));
  }

  // add(a vector of each column) in order, over `terms` terms
  template <int COLS, class Add>
  PEFTKERN_INLINE void read(const PairReader& r, const Places<Form, COLS>& at, int64_t terms, int64_t ahead,
                            const Add& add) {
    // No more at a time than lie in a cache line, or what is asked for would come in bursts.
    constexpr int64_t kLine = 64 / Form::kBytes * kPair;
    decltype(Form::group(r.form, r.groups.of(0))) f[COLS];
    for (int64_t t = 0, byte = 0, group = 0, left = at.left; t < terms;) {
      const int64_t some = smaller(smaller(left, kLine), terms - t);
#pragma GCC unroll 4
      for (int j = 0; j < COLS; ++j) f[j] = Form::group(r.form, r.groups.of(at.group[j] + group));
      if (t % kLine == 0)
#pragma GCC unroll 4
        for (int j = 0; j < COLS; ++j) __builtin_prefetch(at.codes[j] + byte + ahead);
      for (int64_t i = 0; i < some; i += kPair, byte += Form::kBytes) {
        __m512i b[COLS];
#pragma GCC unroll 4
        for (int j = 0; j < COLS; ++j) b[j] = Form::in_bf16(at.codes[j] + byte, f[j]);
        add(b);
      }
      t += some, left -= some;
      if (left == 0) left = at.size, ++group;
    }
  }
};

// Codes of 4 bits in groups of whole 64: a cache line at a time, whose halves have a scale each. Beside what
// 16 codes stand for with the one lies the same with the other, and a 5th bit says which.
template <class Form, class Groups>
struct LineReader {
  using Codes = Form;
  static constexpr int kVectors = 4;
  static constexpr int64_t kHalf = 64;
  static bool fits(const Quantised& w) { return w.group % kHalf == 0; }
  Form form;
  Groups groups;

  // Element e of vectors 0 to 3 is the code at bit 0, 8, 4 or 12 of 16-bit word e.
  void operator()(const bf16* row, __m512i* to) const {
    auto* words = reinterpret_cast<__m128i*>(to);
    for (int i = 0; i < kVectors; ++i)
      for (int v = 0; v < kVectors; ++v) {
        const int term = (v / 2 + v % 2 * 2) ^ Form::kUpper;
        const __m512i terms = _mm512_srli_epi64(_mm512_loadu_si512(row + i * kPair), 16 * term);
        _mm_storeu_si128(words + v * kVectors + i, _mm512_cvtepi64_epi16(terms));
      }
  }

  template <int COLS, class Add>
  PEFTKERN_INLINE void read(const LineReader& r, const Places<Form, COLS>& at, int64_t terms, int64_t ahead,
                            const Add& add) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1);
    int64_t byte = 0, group = 0, left = at.left;
    const auto next = [&] {
      const int64_t now = group;
      left -= kHalf;
      if (left == 0) left = at.size, ++group;
      return now;
    };
    const auto line = [&](auto whole) __attribute__((always_inline)) {
      __m512i table[COLS];
      const int64_t one = next(), two = whole.value ? next() : one;
#pragma GCC unroll 4
      for (int j = 0; j < COLS; ++j) {
        const vf values = r.form.table.all;
        const vf with_two = whole.value ? apply(r.groups.of(at.group[j] + two), values) : zero();
        table[j] = to_bf16(apply(r.groups.of(at.group[j] + one), values), with_two);
        if (whole.value) __builtin_prefetch(at.codes[j] + byte + ahead);
      }
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        // Read twice: kept, they would need registers that sums have.
        asm("" : "+r"(byte));
        __m512i q[COLS], b[COLS];
#pragma GCC unroll 4
        for (int j = 0; j < COLS; ++j) {
          const uint8_t* p = at.codes[j] + byte;
          q[j] = whole.value ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi64(15, p);
          constexpr int kAndOr = 0xea;  // a & b | c
          q[j] = _mm512_ternarylogic_epi64(odd ? _mm512_srli_epi16(q[j], 4) : q[j], low, second, kAndOr);
          b[j] = _mm512_permutexvar_epi16(q[j], table[j]);
        }
        add(b);
#pragma GCC unroll 4
        for (int j = 0; j < COLS; ++j) b[j] = _mm512_permutexvar_epi16(_mm512_srli_epi16(q[j], 8), table[j]);
        add(b);
      }
      byte += 64;
    };
    for (; terms >= 2 * kHalf; terms -= 2 * kHalf) line(std::true_type());
    if (terms > 0) line(std::false_type());
  }
};

// Of two halves of W: a cache line is half as many codes of a row, of one group.
template <class Groups>
struct LineReader<Halves, Groups> {
  using Codes = Halves;
  static constexpr int kVectors = 2;
  static constexpr int64_t kLine = 64;
  static bool fits(const Quantised& w) { return w.group % kLine == 0; }
  Halves form;
  Groups groups;

  // Element e of vectors 0 and 1 is the code of byte 2 e and 2 e + 1.
  void operator()(const bf16* row, __m512i* to) const {
    const __m512i first = _mm512_loadu_si512(row), second = _mm512_loadu_si512(row + kPair);
    vs even{};
    for (int e = 0; e < kPair; ++e) even[e] = static_cast<uint16_t>(2 * e);
    const auto order = reinterpret_cast<__m512i>(even);
    to[0] = _mm512_permutex2var_epi16(first, order, second);
    to[1] = _mm512_permutex2var_epi16(_mm512_srli_epi32(first, 16), order, _mm512_srli_epi32(second, 16));
  }

  template <int COLS, class Add>
  PEFTKERN_INLINE void read(const LineReader& r, const Places<Halves, COLS>& at, int64_t terms, int64_t ahead,
                            const Add& add) {
    const __m512i shift = _mm512_set1_epi16(static_cast<int16_t>(r.form.shift));
    // The rows of either half ask for the codes of every second column: both halves read them all.
    const uint8_t* asked[COLS];
    for (int j = 0; j < COLS; j += 2) asked[j] = at.codes[r.form.shift == 0 ? j : j + 1] + ahead;
    const __m512i odd_shift = _mm512_add_epi16(shift, _mm512_set1_epi16(8));
    for (int64_t byte = 0, group = 0, left = at.left; byte < terms; left = at.size, ++group) {
      __m512i table[COLS], b[COLS];
#pragma GCC unroll 4
      for (int j = 0; j < COLS; ++j) table[j] = Halves::group(r.form, r.groups.of(at.group[j] + group)).table;
      for (const int64_t end = smaller(byte + left, terms); byte < end; byte += kLine) {
#pragma GCC unroll 4
        for (int j = 0; j < COLS; j += 2) __builtin_prefetch(asked[j] + byte);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          asm("" : "+r"(byte));  // read twice, as above
#pragma GCC unroll 4
          for (int j = 0; j < COLS; ++j) {
            const __m512i q = _mm512_loadu_si512(at.codes[j] + byte);
            b[j] = _mm512_permutexvar_epi16(_mm512_srlv_epi16(q, odd ? odd_shift : shift), table[j]);
          }
          add(b);
        }
      }
    }
  }
};

}  // namespace peftkern::cpu::PEFTKERN_LEVEL

#endif
