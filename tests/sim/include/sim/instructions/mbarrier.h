// Host bodies of cuda/mbarrier.h.
#pragma once

#include "sim/async.h"
#include "sim/instructions/device.h"

namespace peftkern::cuda {

PEFTKERN_DEVICE void mbarrier_init(uint32_t barrier, int count) {
  ::sim::barrier_init(barrier, count);
}
PEFTKERN_DEVICE void mbarrier_init_fence() {
  ::sim::barrier_init_fence();
}
PEFTKERN_DEVICE void mbarrier_arrive(uint32_t barrier) {
  ::sim::barrier_arrive(barrier, 0);
}
PEFTKERN_DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  ::sim::barrier_arrive(barrier, bytes);
}
PEFTKERN_DEVICE void mbarrier_arrive_cluster(uint32_t barrier, uint32_t rank) {
  ::sim::barrier_arrive_cluster(barrier, rank, true);
}
PEFTKERN_DEVICE void mbarrier_arrive_unordered(uint32_t barrier, uint32_t rank) {
  ::sim::barrier_arrive_cluster(barrier, rank, false);
}
PEFTKERN_DEVICE bool mbarrier_test(uint32_t barrier, uint32_t parity) {
  return ::sim::barrier_test(barrier, parity, false);
}
PEFTKERN_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  ::sim::barrier_wait(barrier, parity, false);
}
PEFTKERN_DEVICE bool mbarrier_test_cluster(uint32_t barrier, uint32_t parity) {
  return ::sim::barrier_test(barrier, parity, true);
}
PEFTKERN_DEVICE void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  ::sim::barrier_wait(barrier, parity, true);
}

}  // namespace peftkern::cuda
