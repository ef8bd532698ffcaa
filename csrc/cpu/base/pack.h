// Operands of the base product as fp32 in the order in which the inner loops read them. Conversion from half
// precision and the input scale happen here, once per element.
#pragma once

#include "cpu/base/pairs.h"
#include "cpu/common/simd.h"
#include "peftkern/cpu.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// Columns of the output that one tile covers: two vectors.
constexpr int kTileCols = 2 * W;

typedef float vf_half __attribute__((vector_size(4 * W), aligned(2), may_alias));

PEFTKERN_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// to[k] = from[k * step] * scale[k] for k < n; to has room for whole vectors.
template <class T>
static void pack_row(const T* from, int64_t step, int64_t n, const float* scale, float* to) {
  if (step != 1) {
    for (int64_t k = 0; k < n; ++k) {
      const float x = widen_scalar(from[k * step]);
      to[k] = scale ? x * scale[k] : x;
    }
    return;
  }
  for (int64_t k = 0; k < n; k += W) {
    const int left = static_cast<int>(smaller(W, n - k));
    vf x = left == W ? load(from + k) : load_n(from + k, left);
    if (scale) x *= left == W ? load(scale + k) : load_n(scale + k, left);
    store(to + k, x);
  }
}

// Transposes W vectors of W floats: log2(W) rounds, each interleaving rows i and i + W/2.
PEFTKERN_INLINE void transpose(vf* r) {
  vi low{}, high{};
  for (int i = 0; i < W; ++i) {
    low[i] = (i & 1) * W + i / 2;
    high[i] = low[i] + W / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    vf t[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      t[2 * i] = __builtin_shuffle(r[i], r[i + W / 2], low);
      t[2 * i + 1] = __builtin_shuffle(r[i], r[i + W / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = t[i];
  }
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

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
