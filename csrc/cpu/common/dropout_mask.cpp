// The dropout mask as bytes: peftkern::dropout_mask on CPU.
#include "cpu/common/philox.h"
#include "peftkern/cpu.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

void dropout_mask(const DropoutMaskArgs& a) {
  constexpr int64_t kBlock = 4096;
#pragma omp parallel for schedule(static) num_threads(a.threads)
  for (int64_t i = 0; i < a.M; ++i) {
    uint8_t bits[keep_bits_room(kBlock)];
    for (int64_t j0 = 0; j0 < a.C; j0 += kBlock) {
      const int64_t n = a.C - j0 < kBlock ? a.C - j0 : kBlock;
      keep_bits(a.dropout, i, j0, n, bits);
      uint8_t* out = a.out + i * a.C + j0;
      for (int64_t j = 0; j < n; ++j) out[j] = (bits[j / 8] >> (j % 8)) & 1;
    }
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
