// A quantised W as fp32, run by run: what all that multiplies it reads.
#pragma once

#include "cpu/operand/tile.h"
#include "peftkern/quantised.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// to[i] = W[n, k + i] for i < count. Not rounded below fp32: peftkern/bases has the definition of each kind.
void decode(const Quantised& w, int64_t n, int64_t k, int64_t count, float* to);

// Asks for the codes of such a run.
PEFTKERN_INLINE void ask_for_codes(const Quantised& w, int64_t n, int64_t k, int64_t count) {
  const bool bytes = w.order == Quantised::Order::bytes;
  const int64_t at = n * w.row + k;
  if (w.block_bytes != 0) return;
  ask_for_bytes(w.codes + (bytes ? at : at / 2), bytes ? count : count / 2 + 1);
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
