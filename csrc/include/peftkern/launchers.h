// Every native entry point. Arguments are checked by bindings.cpp; `threads` is the most that a call may use.
#pragma once

#include "peftkern/types.h"

namespace peftkern::cpu {

// The instruction set level in use: "plain", "avx2" or "avx512"; the best that the CPU has until set_isa
// lowers it.
const char* isa();
// Choose a level by name, or "auto". Returns false, changing nothing, if this CPU or build lacks it.
bool set_isa(const char* name);

// out[i, j] = 1 if element (row0 + i, col0 + j) is kept, else 0. out is M x C bytes.
struct DropoutMaskArgs {
  Dropout dropout;
  int64_t M, C;
  uint8_t* out;
  int threads;
};
void dropout_mask(const DropoutMaskArgs& args);

}  // namespace peftkern::cpu

namespace peftkern::cuda {

// The same bits on the GPU. `seed` is one int64 in device memory; out is M x K bytes. Returns a CUDA error
// name or null.
const char* dropout_mask(const int64_t* seed, int64_t M, int64_t K, uint32_t threshold, uint8_t* out,
                         void* stream);

}  // namespace peftkern::cuda
