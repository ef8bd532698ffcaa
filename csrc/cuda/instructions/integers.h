// Integer instructions that C++ has no short way to say.
#pragma once

#include "cuda/instructions/device.h"

#ifdef PEFTKERN_SIM
#include "sim/instructions/integers.h"
#else

namespace peftkern::cuda {

// a * b, all 64 bits, in one instruction: of two 64-bit factors the compiler keeps an addition for the upper
// halves.
PEFTKERN_DEVICE uint64_t multiply_wide(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

}  // namespace peftkern::cuda
#endif
