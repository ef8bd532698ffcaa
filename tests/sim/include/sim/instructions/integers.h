// Host bodies of cuda/integers.h.
#pragma once

#include "sim/instructions/device.h"

namespace peftkern::cuda {

PEFTKERN_DEVICE uint64_t multiply_wide(uint32_t a, uint32_t b) {
  return static_cast<uint64_t>(a) * b;
}

}  // namespace peftkern::cuda
