// Register-blocked fp32 kernels of the low-rank branch. Operands are fp32, columns padded to a multiple of
// kPad; p may also be in half precision, widened as it is read: worth it where few rows share it.
//
//   dot      out[m, r] += sum_c x[m, c] * p[r, c]     lanes over c, reduced once per call in a fixed order
//   combine  out[m, c]  = sum_r v[m, r] * p[r, c]     lanes over c
//   outer    out[r, c] += sum_m v[m, r] * x[m, c]     lanes over c, summed over m in registers first
//
// Every element of a result is computed by one chain of operations that does not depend on the block it is
// part of, so block shapes never change bits.
#pragma once

#include <type_traits>

#include "cpu/common/simd.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

constexpr int64_t kPad = 16;
// combine: chains of at most this many products, then a sum of chains.
constexpr int64_t kCombineChain = 64;

// Block shapes: as many accumulators as the register file holds.
#if defined(__AVX512F__)
constexpr int kDotRows = 6, kDotRanks = 4, kCombineRows = 6, kCombineVectors = 4, kOuterRanks = 4,
              kOuterVectors = 4;
#else
constexpr int kDotRows = 3, kDotRanks = 4, kCombineRows = 6, kCombineVectors = 2, kOuterRanks = 4,
              kOuterVectors = 2;
#endif

// out[0..3] += the sums of the lanes of a, b, c, d (the first n of them).
PEFTKERN_INLINE void add_lane_sums(vf a, vf b, vf c, vf d, int n, float* out) {
#if defined(__AVX2__)
  // Two rounds of interleave and add leave (a, b, c, d) in each 128-bit lane.
#if defined(__AVX512F__)
  const auto pairs = [](vf x, vf y) { return _mm512_unpacklo_ps(x, y) + _mm512_unpackhi_ps(x, y); };
  const __m512d ab = _mm512_castps_pd(pairs(a, b)), cd = _mm512_castps_pd(pairs(c, d));
  const __m512 lanes =
      _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
  const __m256 half = _mm512_castps512_ps256(lanes) + _mm512_extractf32x8_ps(lanes, 1);
#else
  const auto pairs = [](vf x, vf y) { return _mm256_unpacklo_ps(x, y) + _mm256_unpackhi_ps(x, y); };
  const __m256d ab = _mm256_castps_pd(pairs(a, b)), cd = _mm256_castps_pd(pairs(c, d));
  const __m256 half =
      _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)) + _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
#endif
  const __m128 sum = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
  if (n == 4) {
    _mm_storeu_ps(out, _mm_loadu_ps(out) + sum);
    return;
  }
  float sums[4];
  _mm_storeu_ps(sums, sum);
#else
  float sums[4];
  const vf v[4] = {a, b, c, d};
  for (int k = 0; k < 4; ++k) sums[k] = (v[k][0] + v[k][1]) + (v[k][2] + v[k][3]);
#endif
  for (int k = 0; k < n; ++k) out[k] += sums[k];
}

// What a product does between two of its blocks.
struct Nothing {
  void operator()() const {}
};

template <bool ASK, int ROWS, int RANKS, class T>
static void dot_block(const float* x, int64_t ldx, const T* p, int64_t ldp, int64_t n, float* out,
                      int64_t ldo, int rows, const T* next) {
  vf acc[ROWS][RANKS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < RANKS; ++r) acc[m][r] = zero();
  }
  for (int64_t c = 0; c < n; c += W) {
    vf xs[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) xs[m] = load(x + m * ldx + c);
#pragma GCC unroll 4
    for (int r = 0; r < RANKS; ++r) {
      if (ASK) ask_for<W>(next + r * ldp, c);
      const vf ps = load(p + r * ldp + c);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) acc[m][r] = fma(xs[m], ps, acc[m][r]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
    if (m >= rows) break;
    vf s[4] = {};
#pragma GCC unroll 4
    for (int r = 0; r < RANKS; ++r) s[r] = acc[m][r];
    add_lane_sums(s[0], s[1], s[2], s[3], RANKS, out + m * ldo);
  }
}

template <bool ASK, int RANKS, class T, class Between>
static void dot_rows(const float* x, int64_t ldx, int64_t rows, const T* p, int64_t ldp, int64_t n,
                     float* out, int64_t ldo, const T* next, const Between& between) {
  const auto block = [&](auto size, auto ask, int64_t m, int left) {
    dot_block<decltype(ask)::value, decltype(size)::value, RANKS>(x + m * ldx, ldx, p, ldp, n, out + m * ldo,
                                                                  ldo, left, next);
  };
  const auto any = [&](auto ask, int64_t m) {
    between();
    const int left = static_cast<int>(rows - m < kDotRows ? rows - m : kDotRows);
    if (left == 1) {
      block(std::integral_constant<int, 1>(), ask, m, left);
    } else if (left == 2) {
      block(std::integral_constant<int, 2>(), ask, m, left);
    } else {
      block(std::integral_constant<int, kDotRows>(), ask, m, left);
    }
  };
  if (rows > 0) any(std::integral_constant<bool, ASK>(), 0);
  for (int64_t m = kDotRows; m < rows; m += kDotRows) any(std::false_type(), m);
}

// How often dot calls `between`.
PEFTKERN_INLINE int64_t dot_blocks(int64_t rows, int64_t R) {
  return ((rows + kDotRows - 1) / kDotRows) * ((R + kDotRanks - 1) / kDotRanks);
}

// x: at least kDotRows rows may be read from every block's first row (scratch); only `rows` of them count.
// A few rows of p meet all rows of x while they lie in L1. ASK: meanwhile asks for what lies at `next` as p
// does.
template <bool ASK = false, class T, class Between = Nothing>
static void dot(const float* x, int64_t ldx, int64_t rows, const T* p, int64_t ldp, int64_t n, int64_t R,
                float* out, int64_t ldo, const T* next = nullptr, const Between& between = Nothing()) {
  static_assert(kDotRanks == 4);
  const auto ranks = [&](auto count, int64_t r) {
    dot_rows<ASK, decltype(count)::value>(x, ldx, rows, p + r * ldp, ldp, n, out + r, ldo,
                                          ASK ? next + r * ldp : nullptr, between);
  };
  int64_t r = 0;
  for (; r + 4 <= R; r += 4) ranks(std::integral_constant<int, 4>(), r);
  switch (R - r) {
    case 3:
      return ranks(std::integral_constant<int, 3>(), r);
    case 2:
      return ranks(std::integral_constant<int, 2>(), r);
    case 1:
      return ranks(std::integral_constant<int, 1>(), r);
  }
}

template <int ROWS, int VECTORS, class T>
static void combine_block(const float* v, int64_t ldv, int64_t R, const T* p, int64_t ldp, float* out,
                          int64_t ldo) {
  for (int64_t r0 = 0; r0 == 0 || r0 < R; r0 += kCombineChain) {
    const int64_t r1 = R - r0 < kCombineChain ? R : r0 + kCombineChain;
    vf acc[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) acc[m][j] = zero();
    }
    for (int64_t r = r0; r < r1; ++r) {
      vf ps[VECTORS];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) ps[j] = load(p + r * ldp + j * W);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) {
        const vf vs = splat(v[m * ldv + r]);
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) acc[m][j] = fma(vs, ps[j], acc[m][j]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) {
        float* o = out + m * ldo + j * W;
        store(o, r0 == 0 ? acc[m][j] : load(o) + acc[m][j]);
      }
    }
  }
}

template <int ROWS, class T>
static void combine_rows(const float* v, int64_t ldv, int64_t R, const T* p, int64_t ldp, int64_t n,
                         float* out, int64_t ldo) {
  constexpr int64_t kStep = kCombineVectors * W;
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep)
    combine_block<ROWS, kCombineVectors>(v, ldv, R, p + c, ldp, out + c, ldo);
  // By one vector alone each product would wait for the one before it.
  if constexpr (kCombineVectors > 2) {
    for (; c + 2 * W <= n; c += 2 * W) combine_block<ROWS, 2>(v, ldv, R, p + c, ldp, out + c, ldo);
  }
  for (; c < n; c += W) combine_block<ROWS, 1>(v, ldv, R, p + c, ldp, out + c, ldo);
}

// v (kCombineRows x R) and out (kCombineRows x n) are scratch: rows past `rows` may be computed.
template <class T>
static void combine(const float* v, int64_t ldv, int64_t rows, int64_t R, const T* p, int64_t ldp, int64_t n,
                    float* out, int64_t ldo) {
  if (rows == 1) {
    combine_rows<1>(v, ldv, R, p, ldp, n, out, ldo);
  } else if (rows == 2) {
    combine_rows<2>(v, ldv, R, p, ldp, n, out, ldo);
  } else {
    combine_rows<kCombineRows>(v, ldv, R, p, ldp, n, out, ldo);
  }
}

template <int RANKS, int VECTORS>
static void outer_block(const float* x, int64_t ldx, int64_t rows, const float* v, int64_t ldv, float* out,
                        int64_t ldo) {
  vf acc[RANKS][VECTORS];
#pragma GCC unroll 4
  for (int r = 0; r < RANKS; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) acc[r][j] = zero();
  }
  for (int64_t m = 0; m < rows; ++m) {
    vf xs[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) xs[j] = load(x + m * ldx + j * W);
#pragma GCC unroll 4
    for (int r = 0; r < RANKS; ++r) {
      const vf vs = splat(v[m * ldv + r]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) acc[r][j] = fma(vs, xs[j], acc[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < RANKS; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      float* o = out + r * ldo + j * W;
      store(o, load(o) + acc[r][j]);
    }
  }
}

template <int RANKS, class Between>
static void outer_columns(const float* x, int64_t ldx, int64_t rows, const float* v, int64_t ldv, int64_t n,
                          float* out, int64_t ldo, const Between& between) {
  constexpr int64_t kStep = kOuterVectors * W;
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep) {
    between();
    outer_block<RANKS, kOuterVectors>(x + c, ldx, rows, v, ldv, out + c, ldo);
  }
  if constexpr (kOuterVectors > 2) {
    for (; c + 2 * W <= n; c += 2 * W) outer_block<RANKS, 2>(x + c, ldx, rows, v, ldv, out + c, ldo);
  }
  for (; c < n; c += W) outer_block<RANKS, 1>(x + c, ldx, rows, v, ldv, out + c, ldo);
}

// How often outer calls `between`.
PEFTKERN_INLINE int64_t outer_blocks(int64_t n, int64_t R) {
  constexpr int64_t kStep = kOuterVectors * W;
  return ((n + kStep - 1) / kStep) * ((R + kOuterRanks - 1) / kOuterRanks);
}

// rows is at most a few dozen: the length of a chain in registers.
template <class Between = Nothing>
static void outer(const float* x, int64_t ldx, int64_t rows, const float* v, int64_t ldv, int64_t R,
                  int64_t n, float* out, int64_t ldo, const Between& between = Nothing()) {
  static_assert(kOuterRanks == 4);
  int64_t r = 0;
  for (; r + 4 <= R; r += 4) outer_columns<4>(x, ldx, rows, v + r, ldv, n, out + r * ldo, ldo, between);
  switch (R - r) {
    case 3:
      return outer_columns<3>(x, ldx, rows, v + r, ldv, n, out + r * ldo, ldo, between);
    case 2:
      return outer_columns<2>(x, ldx, rows, v + r, ldv, n, out + r * ldo, ldo, between);
    case 1:
      return outer_columns<1>(x, ldx, rows, v + r, ldv, n, out + r * ldo, ldo, between);
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
