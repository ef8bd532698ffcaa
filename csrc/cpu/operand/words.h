// The loader of a W in codes of 8 bits, as they are, for products with codes: an element of a tile is a word,
// kWordTerms terms of one column. With AVX512-VNNI these are 4 bytes, codes plus 128; elsewhere 2 codes of 16
// bits.
#pragma once

#include "cpu/operand/codes.h"
#include "cpu/operand/quantised.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

#if defined(__AVX512VNNI__)
constexpr int kWordTerms = 4, kWordOffset = 128;
#else
constexpr int kWordTerms = 2, kWordOffset = 0;
#endif
// Codes that a vector of words holds.
constexpr int kWordCodes = W * kWordTerms;

// The words of kWordCodes adjacent codes, without an offset.
PEFTKERN_INLINE vu words(const int8_t* p) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<vu>(_mm512_loadu_si512(p));
#else
  typedef int8_t narrow __attribute__((vector_size(2 * W), aligned(1), may_alias));
  typedef int16_t wide __attribute__((vector_size(4 * W)));
  const wide x = __builtin_convertvector(*reinterpret_cast<const narrow*>(p), wide);
  return reinterpret_cast<const vu&>(x);
#endif
}

// Codes of adjacent columns, one a lane, as a term of their words.
template <int TERM>
PEFTKERN_INLINE vu as_term(vu bytes) {
#if defined(__AVX512VNNI__)
  return bytes << 8 * TERM;
#else
  const vi code = reinterpret_cast<const vi&>(bytes) << 24 >> 24;
  return TERM == 0 ? reinterpret_cast<const vu&>(code) & 0xffffu : reinterpret_cast<const vu&>(code) << 16;
#endif
}

PEFTKERN_INLINE vu offset(vu x) {
  return kWordOffset != 0 ? x ^ 0x80808080u : x;
}

class Words : public Decoded<int8_t> {
 public:
  using Decoded<int8_t>::Decoded;

  // As Dense has it; what lies beyond `cols` and `depth` has any value, and meets zeros or is not read.
  void pack(int64_t col, int64_t k, int cols, int depth, uint32_t* to) const {
    for (int half = 0; half < kTileCols; half += W) {
      const int some = static_cast<int>(smaller(W, cols - half));
      across() ? pack_across(k, begin() + col + half, some, depth, to + half)
               : pack_down(begin() + col + half, k, some, depth, to + half);
    }
  }

 private:
  const int8_t* at(int64_t n, int64_t k) const {
    return reinterpret_cast<const int8_t*>(weight().codes) + n * weight().row + k;
  }

  // Terms follow one another in a row of W.
  void pack_down(int64_t n, int64_t k, int cols, int depth, uint32_t* to) const {
    for (int t = 0; t < depth; t += kWordCodes, to += W * kTileCols) {
      const int left = depth - t;
      vf r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        alignas(64) int8_t part[kWordCodes] = {};
        const int8_t* from = part;
        if (i < cols && left >= kWordCodes) {
          from = at(n + i, k + t);
        } else if (i < cols) {
          std::memcpy(part, at(n + i, k + t), static_cast<size_t>(left));
        }
        const vu x = offset(words(from));
        r[i] = reinterpret_cast<const vf&>(x);
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        if (i * kWordTerms < left) store(reinterpret_cast<float*>(to + i * kTileCols), r[i]);
    }
  }

  // Columns follow one another in a row of W, each of which is a term.
  void pack_across(int64_t n, int64_t k, int cols, int depth, uint32_t* to) const {
    const auto term = [&](int t) {
      if (t < depth && cols >= W) return widen_bytes(reinterpret_cast<const uint8_t*>(at(n + t, k)));
      alignas(64) uint8_t part[W] = {};
      if (t < depth && cols > 0) std::memcpy(part, at(n + t, k), static_cast<size_t>(cols));
      return widen_bytes(part);
    };
    for (int t = 0; t < depth; t += kWordTerms, to += kTileCols) {
      vu x = as_term<0>(term(t)) | as_term<1>(term(t + 1));
      if constexpr (kWordTerms == 4) x |= as_term<2>(term(t + 2)) | as_term<3>(term(t + 3));
      x = offset(x);
      store(reinterpret_cast<float*>(to), reinterpret_cast<const vf&>(x));
    }
  }
};

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
