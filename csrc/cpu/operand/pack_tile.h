// Tiles of a dense W, packed in the order in which products of many rows read them: as fp32, or, with
// AVX512-BF16, as pairs of bf16 terms.
#pragma once

#include <type_traits>

#include "cpu/operand/tile.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

typedef float vf_half __attribute__((vector_size(4 * W), aligned(2), may_alias));

// Elements of a cache line, or of a pair if that is longer.
template <class T>
constexpr int kLineOrPair = 64 / sizeof(T) < kPair ? kPair : 64 / sizeof(T);

// Starts to load N elements into a level of cache (3: L1, 2: L2).
template <int N, int LEVEL, class T>
PEFTKERN_INLINE void ask_for(const T* p) {
#pragma GCC unroll 4
  for (int i = 0; i < N; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(p + i, 0, LEVEL);
}

// W columns by kPair steps: a vector of bf16 is W pairs of steps, transposed as 32-bit words and then
// widened.
PEFTKERN_INLINE void pack_pairs(const bf16* from, int64_t col, float* to) {
  vf r[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) r[i] = *reinterpret_cast<const vf_half*>(from + i * col);
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    const vu u = reinterpret_cast<const vu&>(r[i]), even = u << 16, odd = u & 0xffff0000u;
    store(to + 2 * i * kTileCols, reinterpret_cast<const vf&>(even));
    store(to + (2 * i + 1) * kTileCols, reinterpret_cast<const vf&>(odd));
  }
}

// W columns by W steps; the last ones may be missing.
template <class T>
static void pack_square(const T* from, int64_t col, int cols, int depth, float* to) {
  vf r[W];
  if (cols >= W && depth >= W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = load(from + i * col);
  } else {
    for (int i = 0; i < W; ++i) r[i] = i < cols ? load_n(from + i * col, depth) : zero();
  }
  transpose(r);
  for (int i = 0; i < depth; ++i) store(to + i * kTileCols, r[i]);
}

// W columns by `depth` steps.
template <class T>
PEFTKERN_INLINE void pack_run(const T* from, int64_t col, int cols, int depth, float* to) {
  int k = 0;
  if constexpr (std::is_same<T, bf16>::value)
    if (cols >= W)
      for (; k + kPair <= depth; k += kPair) pack_pairs(from + k, col, to + k * kTileCols);
  for (; k < depth; k += W)
    pack_square(from + k, col, cols, static_cast<int>(smaller(W, depth - k)), to + k * kTileCols);
}

// to[k][c] = from[c * col + k * step] for k < depth, c < cols; columns from cols to kTileCols are zero.
// A tile is half a kilobyte of each of its rows of W, or a few bytes of each of many: too short for the
// hardware to see the next tile coming, which is therefore asked for (into L2: L1 is full of packed tiles).
template <class T>
static void pack_tile(const T* from, int64_t col, int64_t step, int cols, int depth, float* to) {
  if (col == 1) {
    const int second = cols > W ? cols - W : 0, first = cols - second;
    for (int k = 0; k < depth; ++k, from += step, to += kTileCols) {
      __builtin_prefetch(from + 2 * kTileCols, 0, 2);
      store(to, first == W ? load(from) : load_n(from, first));
      store(to + W, second == W ? load(from + W) : second > 0 ? load_n(from + W, second) : zero());
    }
    return;
  }
  if (step == 1) {
    constexpr int kStep = kLineOrPair<T>;
    for (int k = 0; k < depth; k += kStep)
      for (int half = 0; half < kTileCols; half += W) {
        // A few at a time: more than the cache can wait for would stop everything else.
        for (int i = 0; i < W; ++i) ask_for<kStep, 2>(from + (kTileCols + half + i) * col + k);
        pack_run(from + half * col + k, col, cols - half, static_cast<int>(smaller(kStep, depth - k)),
                 to + k * kTileCols + half);
      }
    return;
  }
  for (int k = 0; k < depth; ++k)
    for (int c = 0; c < kTileCols; ++c)
      to[k * kTileCols + c] = c < cols ? widen_scalar(from[c * col + k * step]) : 0.0f;
}

#if defined(__AVX512BF16__)
// Columns of B are read in short pieces, many at a time, which defeats the hardware's guesses. Terms ahead.
constexpr int kPairsAhead = 96;

PEFTKERN_INLINE uint32_t pair(const bf16* p, int64_t step, bool whole) {
  const uint32_t low = p[0].bits;
  return whole ? low | static_cast<uint32_t>(p[step].bits) << 16 : low;
}

// n bf16 values in a vector of 32, the rest zero.
PEFTKERN_INLINE __m512i load_bf16(const bf16* p, int n) {
  const __mmask32 mask = n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
  return _mm512_maskz_loadu_epi16(mask, p);
}

// Pairs of terms that are adjacent along k: to[k / 2][c]; what is missing is zero.
static void pack_tile(const bf16* from, int64_t col, int64_t step, int cols, int n, uint32_t* to) {
  if (col == 1) {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 32; ++i) {
      low[i] = static_cast<uint16_t>(i / 2 + (i % 2) * 32);
      high[i] = static_cast<uint16_t>(16 + i / 2 + (i % 2) * 32);
    }
    const __m512i first = _mm512_load_si512(low), second = _mm512_load_si512(high);
    for (int k = 0; k < n; k += 2, to += kTileCols) {
      const __m512i even = load_bf16(from + k * step, cols);
      const __m512i odd = k + 1 < n ? load_bf16(from + (k + 1) * step, cols) : _mm512_setzero_si512();
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, first, odd));
      _mm512_storeu_si512(to + W, _mm512_permutex2var_epi16(even, second, odd));
    }
    return;
  }
  if (step == 1) {
    for (int k = 0; k < n; k += 32) {
      const int left = n - k, pairs = static_cast<int>(smaller(16, (left + 1) / 2));
      for (int half = 0; half < kTileCols; half += W) {
        vf r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          const __m512i v =
              half + i < cols ? load_bf16(from + (half + i) * col + k, left) : _mm512_setzero_si512();
          __builtin_prefetch(from + (half + i) * col + k + kPairsAhead);
          r[i] = _mm512_castsi512_ps(v);
        }
        transpose(r);
        for (int i = 0; i < pairs; ++i)
          store(reinterpret_cast<float*>(to) + (k / 2 + i) * kTileCols + half, r[i]);
      }
    }
    return;
  }
  for (int k = 0; k < n; k += 2)
    for (int c = 0; c < kTileCols; ++c)
      to[k / 2 * kTileCols + c] = c < cols ? pair(from + c * col + k * step, step, k + 1 < n) : 0;
}
#endif

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
