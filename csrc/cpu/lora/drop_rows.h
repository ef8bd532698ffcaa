// A block of bf16 as dropout leaves it, as an operand of a product of bf16. The factor 1 / (1 - p) comes
// after it.
#pragma once

#include "cpu/common/philox.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// to = drop(from), `rows` rows from i0 and n columns from c0 on.
static void drop_rows(const Dropout& drop, int64_t i0, int64_t c0, int64_t rows, int64_t n, const bf16* from,
                      int64_t ld, bf16* to, int64_t ld_to) {
  constexpr int64_t kStep = 256;
  uint8_t bits[keep_bits_room(kStep)];
  for (int64_t i = 0; i < rows; ++i, from += ld, to += ld_to)
    for (int64_t c = 0; c < n; c += kStep) {
      const int64_t part = n - c < kStep ? n - c : kStep;
      keep_bits(drop, i0 + i, c0 + c, part, bits);
      for (int64_t k = 0; k < part; k += W) {
        const int left = static_cast<int>(part - k < W ? part - k : W);
        store_n(to + c + k, select(bits, k, load_n(from + c + k, left)), left);
      }
    }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
