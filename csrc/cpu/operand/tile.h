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

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
