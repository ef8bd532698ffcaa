// Rows of the activation as fp32 in the order in which the inner loops read them. Conversion from half
// precision and the input scale happen here, once per element.
#pragma once

#include "cpu/operand/tile.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

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

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
