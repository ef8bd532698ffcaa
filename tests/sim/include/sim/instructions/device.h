// CUDA's keywords and built-in variables for a C++ compiler.
#pragma once

#include "sim/core.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::sim::self->index)
#define blockIdx (::sim::self->block->index)
#define blockDim (::sim::self->block->size)
#define gridDim (::sim::self->block->grid)

#define PEFTKERN_DEVICE inline

namespace peftkern::cuda {

PEFTKERN_DEVICE unsigned char* shared_memory() {
  return ::sim::self->block->shared;
}

PEFTKERN_DEVICE uint32_t shared_address(const void* p) {
  const ::sim::Block* block = ::sim::self->block;
  return block->shared_base + static_cast<uint32_t>(static_cast<const unsigned char*>(p) - block->shared);
}

}  // namespace peftkern::cuda
