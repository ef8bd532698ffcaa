// The forms of a quantised W's codes: how a pair of vectors is made of those of one group. Of neighbours of 4
// bits the first is the even ones, which takes a shuffle less than their own order; what meets them is in the
// same order, as Dense<bf16>::to_pair has it.
#pragma once

#include "cpu/operand/codes.h"
#include "cpu/operand/groups.h"
#include "cpu/operand/tile.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

#if defined(__AVX512BF16__)
typedef uint16_t vs __attribute__((vector_size(64), may_alias));

// Rounded to nearest even, numbers below the normal range to zero.
PEFTKERN_INLINE __m512i to_bf16(vf first, vf second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}
#endif

// What the codes of a group stand for: found among 16 numbers that were scaled before, if they fit registers.
template <class F>
struct GroupValues {
  Values16 table;
  GroupValues() = default;
#if defined(__AVX512F__)
  GroupValues(const Values16& t, const F& f) : table(t) { table.all = apply(f, t.all); }
  PEFTKERN_INLINE vf look_up(const GroupValues& g, vu q) { return Values16::look_up(g.table, q); }
#elif defined(__AVX2__)
  GroupValues(const Values16& t, const F& f) : table(t) {
    table.low = apply(f, t.low), table.high = apply(f, t.high);
  }
  PEFTKERN_INLINE vf look_up(const GroupValues& g, vu q) { return Values16::look_up(g.table, q); }
#else
  F f;
  GroupValues(const Values16& t, const F& one) : table(t), f(one) {}
  PEFTKERN_INLINE vf look_up(const GroupValues& g, vu q) { return apply(g.f, Values16::look_up(g.table, q)); }
#endif
};

// Neighbours in a byte.
template <bool UPPER>
struct Nibbles {
  static constexpr bool kFourBits = true, kHalves = false, kUpper = UPPER;
  static constexpr int kBytes = W;  // of a pair
  static constexpr int64_t bytes(int64_t codes) { return codes / 2; }
  const Values16 table;
  explicit Nibbles(const Quantised& w) : table(values_of(w.code)) {}
  const Nibbles& in_row(const Quantised&, int64_t) const { return *this; }
  // W[n, k + i], kPair of them, of a group with f.
  template <class F>
  PEFTKERN_INLINE GroupValues<F> in_fp32(const Nibbles& form, const F& f) {
    return {form.table, f};
  }
  template <class F>
  PEFTKERN_INLINE void pair(const Nibbles&, const GroupValues<F>& g, const uint8_t* p, vf& even, vf& odd) {
    const vu q = widen_bytes(p);
    even = GroupValues<F>::look_up(g, UPPER ? q >> 4 : q);
    odd = GroupValues<F>::look_up(g, UPPER ? q : q >> 4);
  }

#if defined(__AVX512BF16__)
  // What the codes of a group stand for, rounded to bf16, twice over: the 5th bit of a code's lane is of no
  // account.
  template <class F>
  PEFTKERN_INLINE __m512i group(const Nibbles& form, const F& f) {
    const vf values = apply(f, form.table.all);
    return to_bf16(values, values);
  }
  // kPair codes: element 8 i + j is that of term 4 j + i.
  PEFTKERN_INLINE __m512i in_bf16(const uint8_t* p, __m512i table) {
    vs shift{};
    for (int i = 0; i < 32; ++i) shift[i] = static_cast<uint16_t>(UPPER ? (i / 8 * 4) ^ 4 : i / 8 * 4);
    const __m512i q = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(q, reinterpret_cast<__m512i>(shift)), table);
  }
  static constexpr int place(int element) { return element % 8 * 4 + element / 8; }
#endif
};

// Codes of 4 bits of the two halves of W in a byte: a row has one of the two of each byte, in order.
struct Halves {
  static constexpr bool kFourBits = true, kHalves = true;
  static constexpr int kBytes = kPair;
  static constexpr int64_t bytes(int64_t codes) { return codes; }
  const Values16 table;
  const int shift;
  explicit Halves(const Quantised& w)
      : table(values_of(w.code)), shift(w.order == Quantised::Order::halves_upper ? 4 : 0) {}
  // For row n; for all others of its half, too. A form is of the first half's rows at first.
  Halves in_row(const Quantised& w, int64_t n) const { return {table, n < w.N / 2 ? shift : 4 - shift}; }
  template <class F>
  PEFTKERN_INLINE GroupValues<F> in_fp32(const Halves& form, const F& f) {
    return {form.table, f};
  }
  template <class F>
  PEFTKERN_INLINE void pair(const Halves& form, const GroupValues<F>& g, const uint8_t* p, vf& first,
                            vf& second) {
    first = GroupValues<F>::look_up(g, widen_bytes(p) >> form.shift);
    second = GroupValues<F>::look_up(g, widen_bytes(p + W) >> form.shift);
  }

#if defined(__AVX512BF16__)
  struct Group {
    __m512i table, shift;
  };
  template <class F>
  PEFTKERN_INLINE Group group(const Halves& form, const F& f) {
    const vf values = apply(f, form.table.all);
    return {to_bf16(values, values), _mm512_set1_epi16(static_cast<int16_t>(form.shift))};
  }
  // kPair codes in their order.
  PEFTKERN_INLINE __m512i in_bf16(const uint8_t* p, const Group& g) {
    const __m512i q = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(q, g.shift), g.table);
  }
  static constexpr int place(int element) { return element; }
#endif

 private:
  Halves(const Values16& values, int bits) : table(values), shift(bits) {}
};

template <Quantised::Code CODE>
struct Bytes {
  static constexpr bool kFourBits = false, kHalves = false;
  static constexpr int kBytes = kPair;
  static constexpr int64_t bytes(int64_t codes) { return codes; }
  explicit Bytes(const Quantised&) {}
  const Bytes& in_row(const Quantised&, int64_t) const { return *this; }
  template <class F>
  PEFTKERN_INLINE F in_fp32(const Bytes&, const F& f) {
    return f;
  }
  template <class F>
  PEFTKERN_INLINE void pair(const Bytes&, const F& f, const uint8_t* p, vf& first, vf& second) {
    first = apply(f, values8<CODE>(p)), second = apply(f, values8<CODE>(p + W));
  }

#if defined(__AVX512BF16__)
  template <class F>
  PEFTKERN_INLINE F group(const Bytes&, const F& f) {
    return f;
  }
  // kPair codes in their order.
  template <class F>
  PEFTKERN_INLINE __m512i in_bf16(const uint8_t* p, const F& f) {
    return to_bf16(apply(f, values8<CODE>(p)), apply(f, values8<CODE>(p + W)));
  }
  static constexpr int place(int element) { return element; }
#endif
};

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
