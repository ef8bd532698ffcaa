// A quantised W as fp32, run by run: what all that multiplies it reads.
#pragma once

#include "cpu/common/simd.h"
#include "peftkern/quantised.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// to[i] = W[n, k + i] for i < count. Not rounded below fp32: peftkern/bases has the definition of each kind.
void decode(const Quantised& w, int64_t n, int64_t k, int64_t count, float* to);

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
