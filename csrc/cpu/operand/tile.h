// What loaders of W and the products that use them agree on: the size of a tile, and how many elements are
// read at once.
#pragma once

#include "cpu/common/simd.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// Columns of the output that one tile covers: two vectors.
constexpr int kTileCols = 2 * W;

// Elements of W that products of few rows read at once, as two vectors.
constexpr int kPair = 2 * W;

PEFTKERN_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Starts to load what lies from p on into L1. (Whatever calls it has to be inlined: GCC drops calls of
// functions that only prefetch, as if they had no effect.)
PEFTKERN_INLINE void ask_for_bytes(const void* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(p) + b);
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

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
