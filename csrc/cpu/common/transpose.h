// Squares of W x W floats, transposed in registers.
#pragma once

#include "cpu/common/simd.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

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
