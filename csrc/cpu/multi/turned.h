// Few rows of a panel whose ranks are adjacent, as B of a list of adapters, (N, R): turned in registers.
#pragma once

#include "cpu/multi/panel.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// A piece: kDotRanks ranks of so many columns, whose part of the rows, in fp32, is in a first-level cache of
// 32 KB. The longer its runs the better: the hardware's guesses start anew with each.
constexpr int64_t kStreamFloats = kFewRows * 1024;
constexpr int64_t stream_cols(int64_t rows) {
  return kStreamFloats / rows / kTileCols * kTileCols;
}

// Ranks of a column that 16 bytes hold.
template <class T>
constexpr int kTurned = 16 / sizeof(T);

// Lane l is the 16 bytes at p + l * ld.
template <class T>
PEFTKERN_INLINE vf load_lanes(const T* p, int64_t ld) {
  const auto lane = [p, ld](int l) { return reinterpret_cast<const float*>(p + l * ld); };
#if defined(__AVX512F__)
  const __m512 two =
      _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(lane(0))), _mm_loadu_ps(lane(1)), 1);
  return _mm512_insertf32x4(_mm512_insertf32x4(two, _mm_loadu_ps(lane(2)), 2), _mm_loadu_ps(lane(3)), 3);
#elif defined(__AVX2__)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(lane(0))), _mm_loadu_ps(lane(1)), 1);
#else
  vf v;
  std::memcpy(&v, lane(0), sizeof(v));
  return v;
#endif
}

// The elements in the four bytes of each word, one after the other.
PEFTKERN_INLINE void widen_words(vf words, float, vf* t) {
  t[0] = words;
}
PEFTKERN_INLINE void widen_words(vf words, bf16, vf* t) {
  const vu u = reinterpret_cast<const vu&>(words), first = u << 16, second = u & 0xffff0000u;
  t[0] = reinterpret_cast<const vf&>(first), t[1] = reinterpret_cast<const vf&>(second);
}
PEFTKERN_INLINE void widen_words(vf words, f16, vf* t) {
  const vu u = reinterpret_cast<const vu&>(words);
  t[0] = from_f16_bits(__builtin_convertvector(u & 0xffffu, vh));
  t[1] = from_f16_bits(__builtin_convertvector(u >> 16, vh));
}

// t[r] = rank r of W columns from p on, a column every `ldp` elements.
template <class T>
PEFTKERN_INLINE void turned(const T* p, int64_t ldp, vf* t) {
  vf r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) r[i] = load_lanes(p + i * ldp, 4 * ldp);
  transpose<4>(r);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) widen_words(r[i], T(), t + i * kTurned<T> / 4);
}

// The same of the first `cols` columns and `depth` ranks; the rest zero.
template <class T>
static void turned_part(const T* p, int64_t ldp, int cols, int depth, vf* t) {
  alignas(64) T room[W * kTurned<T> + W];
  for (int i = 0; i < W; ++i) {
    const T* from = i < cols ? p + i * ldp : p;
    const int here = i < cols ? depth : 0;
    for (int k = 0; k < kTurned<T>; k += W)
      copy_n(from + k, here > k + W ? W : here > k ? here - k : 0, room + i * kTurned<T> + k);
  }
  turned(room, kTurned<T>, t);
}

// acc[m] = sum over ranks [0, depth) of v[m, r] * p[c, r], one after the other, for n <= W columns c.
template <int ROWS, class T>
PEFTKERN_INLINE void turned_chain(const float* v, int64_t ldv, const T* p, int64_t ldp, int n, int64_t depth,
                                  vf* acc) {
  vf t[kTurned<T>];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) acc[m] = zero();
  const auto add = [&](int64_t r, vf x) {
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) acc[m] = fma(splat(v[m * ldv + r]), x, acc[m]);
  };
  int64_t r = 0;
  for (; n == W && r + kTurned<T> <= depth; r += kTurned<T>) {
    turned(p + r, ldp, t);
#pragma GCC unroll 8
    for (int k = 0; k < kTurned<T>; ++k) add(r + k, t[k]);
  }
  for (; r < depth; r += kTurned<T>) {
    vf part[kTurned<T>];
    const int take = static_cast<int>(min64(kTurned<T>, depth - r));
    turned_part(p + r, ldp, n, take, part);
    for (int k = 0; k < take; ++k) add(r + k, part[k]);
  }
}

// Columns between what is turned and what is asked for.
constexpr int64_t kTurnAhead = 32;

// As stream_sums, of a panel whose ranks are adjacent. Both halves of the columns are read side by side: each
// page of one costs a walk, which the other's reading hides.
template <int ROWS, class T>
static void turned_sums(const float* v, int64_t ldv, const MultiSegment& s, int64_t c0, int64_t cols,
                        float* sum) {
  const int64_t ldp = s.p.col, half = round_up((cols + 1) / 2, W);
  const T* data = static_cast<const T*>(s.p.data) + c0 * ldp;
  const auto some = [&](int64_t c) {
    const T* p = data + c * ldp;
    const int n = static_cast<int>(min64(W, cols - c));
    for (int64_t b = 0; b < W * s.R; b += 64 / sizeof(T)) __builtin_prefetch(p + kTurnAhead * ldp + b, 0, 3);
    vf total[ROWS];
    turned_chain<ROWS>(v, ldv, p, ldp, n, min64(s.R, kCombineChain), total);
    for (int64_t r = kCombineChain; r < s.R; r += kCombineChain) {
      vf chain[ROWS];
      turned_chain<ROWS>(v + r, ldv, p + r, ldp, n, min64(s.R - r, kCombineChain), chain);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) total[m] += chain[m];
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) store(sum + m * stream_cols(ROWS) + c, total[m]);
  };
  for (int64_t i = 0; i < half; i += W) {
    for (int64_t c = i; c < cols; c += half) some(c);
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
