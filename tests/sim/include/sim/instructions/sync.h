// Host bodies of cuda/sync.h.
#pragma once

#include "sim/async.h"
#include "sim/barrier.h"
#include "sim/instructions/device.h"
#include "sim/memory_model.h"

namespace peftkern::cuda {

PEFTKERN_DEVICE void sync_threads() {
  ::sim::barrier(0, static_cast<int>(blockDim.x * blockDim.y * blockDim.z), true);
}

template <int Id>
PEFTKERN_DEVICE void barrier_sync(int threads) {
  ::sim::barrier(Id, threads, true);
}

template <int Id>
PEFTKERN_DEVICE void barrier_arrive(int threads) {
  ::sim::barrier(Id, threads, false);
}

PEFTKERN_DEVICE void fence_device() {
  ::sim::fence();
}
PEFTKERN_DEVICE void fence_async_proxy() {
  ::sim::fence_async_proxy();
}

PEFTKERN_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t value) {
  ::sim::maybe_yield();
  const uint32_t old = *p;
  *p = old + value;
  ::sim::step_aside(3);
  return old;
}

PEFTKERN_DEVICE uint32_t atomic_max(uint32_t* p, uint32_t value) {
  ::sim::maybe_yield();
  const uint32_t old = *p;
  *p = value > old ? value : old;
  ::sim::step_aside(3);
  return old;
}

PEFTKERN_DEVICE uint32_t atomic_count(uint32_t* p, uint32_t limit) {
  ::sim::maybe_yield();
  const uint32_t old = *p;
  *p = old >= limit - 1 ? 0 : old + 1;
  ::sim::step_aside(3);
  return old;
}

PEFTKERN_DEVICE void wait_at_least(const uint32_t* p, uint32_t value) {
  ::sim::spin("another block's count", [=] { return *p >= value; });
}

PEFTKERN_DEVICE void grid_wait() {
  ::sim::grid_wait();
}
// Every dependent launch starts as early as it may.
PEFTKERN_DEVICE void grid_launch_dependents() {}

// Only what the instruction demands of its callers.
template <int Count>
PEFTKERN_DEVICE void registers_increase() {
  static_assert(Count >= 24 && Count <= 256 && Count % 8 == 0);
  ::sim::meet("setmaxnreg.inc", 0xffffffffu, nullptr, nullptr);
}
template <int Count>
PEFTKERN_DEVICE void registers_decrease() {
  static_assert(Count >= 24 && Count <= 256 && Count % 8 == 0);
  ::sim::meet("setmaxnreg.dec", 0xffffffffu, nullptr, nullptr);
}

}  // namespace peftkern::cuda
