// A quantised W as products of few rows read it in registers: pairs of vectors. Of codes of 4 bits the first
// is the even ones, which takes a shuffle less than their own order; what meets them is in the same order, as
// Dense<bf16>::to_pair has it.
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

// Which two codes of 4 bits are in a byte.
PEFTKERN_INLINE bool in_neighbours(const Quantised& w) {
  return w.order == Quantised::Order::upper_first || w.order == Quantised::Order::lower_first;
}
PEFTKERN_INLINE bool in_halves(const Quantised& w) {
  return w.order == Quantised::Order::halves_upper || w.order == Quantised::Order::halves_lower;
}

// Whether rows and groups of W are whole pairs, of codes that have such a form.
PEFTKERN_INLINE bool has_pairs(const Quantised& w) {
  const bool four = in_neighbours(w), halves = in_halves(w) && w.N % 2 == 0;
  const bool eight =
      w.order == Quantised::Order::bytes && w.block_bytes == 0 && w.code != Quantised::Code::e5m2;
  return (four || halves || eight) && w.group % kPair == 0 && w.K % w.group == 0 &&
         (!four || w.row % 2 == 0) && w.rows == 1;
}

// use(form, groups) of a W that has pairs.
template <class Use>
PEFTKERN_INLINE void with_pairs(const Quantised& w, const Use& use) {
  using Code = Quantised::Code;
  if (w.order == Quantised::Order::upper_first) {
    if (w.number == Quantised::Number::nested) return use(Nibbles<true>(w), Nested(w));
    return use(Nibbles<true>(w), Floats(w));
  }
  if (w.order == Quantised::Order::lower_first) return use(Nibbles<false>(w), Numbers(w));
  if (in_halves(w)) return use(Halves(w), Numbers(w));
  if (w.code == Code::int8) return use(Bytes<Code::int8>(w), Numbers(w));
  use(Bytes<Code::e4m3>(w), Numbers(w));
}

// Where term k of every row lies, in groups: the same for all rows, and divisions take as long as a dozen
// vectors.
struct Along {
  int64_t k, groups, group, left;
  Along(const Quantised& w, int64_t term)
      : k(term), groups(w.K / w.group), group(term / w.group), left(w.group - term % w.group) {}
};

// How many of `cols` rows of W from n on are of its first half, if halves share bytes; else all.
PEFTKERN_INLINE int64_t of_first_half(const Quantised& w, int64_t n, int64_t cols) {
  return in_halves(w) ? smaller(n < w.N / 2 ? w.N / 2 - n : 0, cols) : cols;
}

// The codes of W[n, k] and of what follows it in its row.
template <class Form>
PEFTKERN_INLINE const uint8_t* codes_at(const Quantised& w, int64_t n, int64_t k) {
  if (Form::kHalves && n >= w.N / 2) n -= w.N / 2;
  return w.codes + Form::bytes(n * w.row + k);
}

// A place in W, and the scale that holds from there on.
template <class Form>
struct Place {
  const uint8_t* codes;
  int64_t group, left;
  Place(const Quantised& w, int64_t n, const Along& at)
      : codes(codes_at<Form>(w, n, at.k)), group(n * at.groups + at.group), left(at.left) {}
};

// Places in COLS columns of a tile from n on, of which `cols` are there; the last stands in for the others.
template <class Form, int COLS>
struct Places {
  const uint8_t* codes[COLS];
  int64_t group[COLS];
  const int64_t left, size;
  Places(const Quantised& w, int64_t n, int64_t cols, const Along& at) : left(at.left), size(w.group) {
    for (int j = 0; j < COLS; ++j) {
      const Place<Form> one(w, n + smaller(j, cols - 1), at);
      codes[j] = one.codes, group[j] = one.group;
    }
  }
};

// to[i] = W[n, k + i] in the order of pairs, for `count` terms, whole pairs.
template <class Form, class Groups>
void decode_pairs(const Form& form, const Groups& groups, const Quantised& w, int64_t n, const Along& k,
                  int64_t count, float* to) {
  Place<Form> at(w, n, k);
  const auto& of_row = form.in_row(w, n);
  for (; count > 0; at.left = w.group) {
    const int64_t some = smaller(at.left, count);
    const auto f = Form::in_fp32(of_row, groups.of(at.group++));
    for (const float* end = to + some; to < end; to += kPair, at.codes += Form::kBytes) {
      vf first, second;
      Form::pair(of_row, f, at.codes, first, second);
      store(to, first), store(to + W, second);
    }
    count -= some;
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
