// Tiles of a dense W, packed in the order in which products of many rows read them: as fp32, or as
// pairs of bf16 terms.
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

// W columns by W steps; unless WHOLE, the last ones may be missing.
template <bool WHOLE, class T>
PEFTKERN_INLINE void pack_square(const T* from, int64_t col, int cols, int depth, float* to) {
  vf r[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    r[i] = WHOLE ? load(from + i * col) : i < cols ? load_n(from + i * col, depth) : zero();
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (WHOLE || i < depth) store(to + i * kTileCols, r[i]);
}

// W columns by `depth` steps.
template <class T>
PEFTKERN_INLINE void pack_run(const T* from, int64_t col, int cols, int depth, float* to) {
  int k = 0;
  if (cols >= W) {
    if constexpr (std::is_same<T, bf16>::value)
      for (; k + kPair <= depth; k += kPair) pack_pairs(from + k, col, to + k * kTileCols);
    for (; k + W <= depth; k += W) pack_square<true>(from + k, col, W, W, to + k * kTileCols);
  }
  for (; k < depth; k += W)
    pack_square<false>(from + k, col, cols, static_cast<int>(smaller(W, depth - k)), to + k * kTileCols);
}

// to[k][c] = from[c * col + k * step] for k < depth, c < cols; columns from cols to kTileCols are zero.
template <class T>
static void pack_tile(const T* from, int64_t col, int64_t step, int cols, int depth, float* to) {
  if (col == 1) {
    const int second = cols > W ? cols - W : 0, first = cols - second;
    for (int k = 0; k < depth; ++k, from += step, to += kTileCols) {
      store(to, first == W ? load(from) : load_n(from, first));
      store(to + W, second == W ? load(from + W) : second > 0 ? load_n(from + W, second) : zero());
    }
    return;
  }
  if (step == 1) {
    for (int half = 0; half < kTileCols; half += W)
      pack_run(from + half * col, col, cols - half, depth, to + half);
    return;
  }
  for (int k = 0; k < depth; ++k)
    for (int c = 0; c < kTileCols; ++c)
      to[k * kTileCols + c] = c < cols ? widen_scalar(from[c * col + k * step]) : 0.0f;
}

PEFTKERN_INLINE uint32_t pair(const bf16* p, int64_t step, bool whole) {
  const uint32_t low = p[0].bits;
  return whole ? low | static_cast<uint32_t>(p[step].bits) << 16 : low;
}

#if defined(__AVX512BF16__)
// n bf16 values in a vector of 32, the rest zero.
PEFTKERN_INLINE __m512i load_bf16(const bf16* p, int n) {
  const __mmask32 mask = n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
  return _mm512_maskz_loadu_epi16(mask, p);
}

// W columns by 32 terms; unless WHOLE, the last ones may be missing.
template <bool WHOLE>
PEFTKERN_INLINE void pack_pair_square(const bf16* from, int64_t col, int cols, int n, uint32_t* to) {
  vf r[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    r[i] = _mm512_castsi512_ps(WHOLE      ? _mm512_loadu_si512(from + i * col)
                               : i < cols ? load_bf16(from + i * col, n)
                                          : _mm512_setzero_si512());
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (WHOLE || 2 * i < n) _mm512_storeu_si512(to + i * kTileCols, _mm512_castps_si512(r[i]));
}
#endif

// Pairs of terms that are adjacent along k: to[k / 2][c]; what is missing is zero.
static void pack_tile(const bf16* from, int64_t col, int64_t step, int cols, int n, uint32_t* to) {
#if defined(__AVX512BF16__)
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
    for (int half = 0; half < kTileCols; half += W, from += W * col) {
      int k = 0;
      if (cols - half >= W)
        for (; k + 32 <= n; k += 32)
          pack_pair_square<true>(from + k, col, W, 32, to + k / 2 * kTileCols + half);
      for (; k < n; k += 32)
        pack_pair_square<false>(from + k, col, cols - half, n - k, to + k / 2 * kTileCols + half);
    }
    return;
  }
#endif
  for (int k = 0; k < n; k += 2)
    for (int c = 0; c < kTileCols; ++c)
      to[k / 2 * kTileCols + c] = c < cols ? pair(from + c * col + k * step, step, k + 1 < n) : 0;
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
