// cp.async (sm_80): copies from global to shared memory that run on while the thread does something else. The
// bytes may be read after copy_wait by this thread, and after a barrier behind it by others.
#pragma once

#include "cuda/instructions/device.h"

#ifdef PEFTKERN_SIM
#include "sim/instructions/copy_async.h"
#else

namespace peftkern::cuda {

// Bytes is 4, 8 or 16; both addresses are aligned to it. Beyond the first `valid` bytes dst gets zeros and
// src is not read.
template <int Bytes>
PEFTKERN_DEVICE void copy_async(uint32_t dst, const void* src, int valid = Bytes) {
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(src), "n"(Bytes), "r"(valid)
                 : "memory");
  }
}

// What this thread has started since the last commit becomes a group.
PEFTKERN_DEVICE void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most Left groups of this thread are under way.
template <int Left>
PEFTKERN_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

}  // namespace peftkern::cuda
#endif
