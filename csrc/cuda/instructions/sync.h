// Barriers of a block, fences, atomics on integers, waiting for another block, dependent launches.
#pragma once

#include "cuda/instructions/device.h"

#ifdef PEFTKERN_SIM
#include "sim/instructions/sync.h"
#else

namespace peftkern::cuda {

// All threads of the block.
PEFTKERN_DEVICE void sync_threads() {
  __syncthreads();
}

// `threads` threads (a multiple of 32) meet at barrier Id, 1 to 15; barrier 0 is sync_threads.
template <int Id>
PEFTKERN_DEVICE void barrier_sync(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(Id), "r"(threads) : "memory");
}

// Counts at the barrier without waiting there.
template <int Id>
PEFTKERN_DEVICE void barrier_arrive(int threads) {
  asm volatile("bar.arrive %0, %1;" ::"n"(Id), "r"(threads) : "memory");
}

// What this thread wrote, and what it has seen through a barrier, is visible to the device before what
// follows.
PEFTKERN_DEVICE void fence_device() {
  __threadfence();
}

// Shared memory written by ordinary stores, before wgmma or a bulk copy reads it.
PEFTKERN_DEVICE void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Return the old value.
PEFTKERN_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t value) {
  return atomicAdd(p, value);
}
PEFTKERN_DEVICE uint32_t atomic_max(uint32_t* p, uint32_t value) {
  return atomicMax(p, value);
}
// value + 1 while that is below limit, else 0 (wraps): a counter that is ready for the next launch.
PEFTKERN_DEVICE uint32_t atomic_count(uint32_t* p, uint32_t limit) {
  return atomicInc(p, limit - 1);
}

// Waits until *p >= value, as other blocks count it up; what they wrote before is then visible.
PEFTKERN_DEVICE void wait_at_least(const uint32_t* p, uint32_t value) {
  uint32_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(p) : "memory");
  } while (seen < value);
}

// Programmatic dependent launch: what the launch before wrote may be read after the wait. Before sm_90 no
// launch is dependent, and there is nothing to wait for.
PEFTKERN_DEVICE void grid_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
PEFTKERN_DEVICE void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Registers per thread of this warpgroup, sm_90a; a multiple of 8 from 24 to 256.
template <int Count>
PEFTKERN_DEVICE void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
PEFTKERN_DEVICE void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

}  // namespace peftkern::cuda
#endif
