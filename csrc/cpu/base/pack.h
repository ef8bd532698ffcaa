// Rows of the activation in the order in which the inner loops read them: as fp32, as pairs of bf16 terms, or
// as words of codes. Conversion from half precision and the input scale happen here, once per element.
#pragma once

#include "cpu/operand/pack_tile.h"
#include "cpu/operand/words.h"

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

// Pairs of terms that are adjacent along the row, without a scale; what is missing of the last one is zero.
static void pack_row(const bf16* from, int64_t step, int64_t n, const float*, uint32_t* to) {
#if defined(__AVX512BF16__)
  if (step == 1) {
    for (int64_t k = 0; k < n; k += 32)
      _mm512_storeu_si512(to + k / 2, load_bf16(from + k, static_cast<int>(smaller(32, n - k))));
    return;
  }
#endif
  for (int64_t k = 0; k < n; k += 2) to[k / 2] = pair(from + k * step, step, k + 1 < n);
}

// Words of adjacent codes, which zeros follow (RoundRowsArgs).
static void pack_row(const int8_t* from, int64_t, int64_t n, const float*, uint32_t* to) {
  for (int64_t k = 0; k < n; k += kWordCodes)
    *reinterpret_cast<vu_any*>(to + k / kWordTerms) = words(from + k);
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
