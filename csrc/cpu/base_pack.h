// Operands of the base product as fp32 in the order in which the inner loops read them. Conversion from half
// precision and the input scale happen here, once per element.
#pragma once

#include "cpu/simd.h"
#include "peftkern/launchers.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// Columns of the output that one tile covers: two vectors.
constexpr int kTileCols = 2 * W;

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
    for (int k = 0; k < depth; k += W) {
      const int left = static_cast<int>(smaller(W, depth - k));
      for (int half = 0; half < kTileCols; half += W) {
        vf r[W];
        if (left == W && half + W <= cols) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) r[i] = load(from + (half + i) * col + k);
        } else {
          for (int i = 0; i < W; ++i)
            r[i] = half + i < cols ? load_n(from + (half + i) * col + k, left) : zero();
        }
        transpose(r);
        for (int i = 0; i < left; ++i) store(to + (k + i) * kTileCols + half, r[i]);
      }
    }
    return;
  }
  for (int k = 0; k < depth; ++k)
    for (int c = 0; c < kTileCols; ++c)
      to[k * kTileCols + c] = c < cols ? widen_scalar(from[c * col + k * step]) : 0.0f;
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
