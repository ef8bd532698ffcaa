// A quantised W as products of few rows read it in registers: pairs of vectors, and where they lie.
#pragma once

#include "cpu/operand/forms.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

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
  if (w.order == Quantised::Order::lower_first) {
    if (Shifted::fit(w)) return use(Nibbles<false>(w), Shifted(w));
    return use(Nibbles<false>(w), Numbers(w));
  }
  if (in_halves(w)) {
    if (Shifted::fit(w)) return use(Halves(w), Shifted(w));
    return use(Halves(w), Numbers(w));
  }
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
