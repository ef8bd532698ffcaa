// What every kernel starts from. Kernels contain no inline PTX and no intrinsics of their own: each
// instruction is a function in one of these headers, with a body for nvcc there and, under PEFTKERN_SIM, one
// for the CPU simulator (tests/sim), which runs the same sources in the test suite.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef PEFTKERN_SIM
#include "sim/instructions/device.h"
#else
#include <cuda_runtime.h>

#define PEFTKERN_DEVICE __device__ __forceinline__

namespace peftkern::cuda {

// The dynamic shared memory of the block, aligned to 16 bytes and no more.
PEFTKERN_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char peftkern_shared[];
  return peftkern_shared;
}

// The 32-bit address of something in shared memory, as the instructions below want it.
PEFTKERN_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

namespace detail {

// A value as the registers of a load or store.
template <class T>
struct Words {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  union {
    uint32_t word[sizeof(T) / 4];
    T value;
  };
  __device__ Words() {}
};

}  // namespace detail

}  // namespace peftkern::cuda
#endif

namespace peftkern::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

// 16 bytes that move in one instruction.
struct alignas(16) Vec16 {
  uint32_t word[4];
};

}  // namespace peftkern::cuda
