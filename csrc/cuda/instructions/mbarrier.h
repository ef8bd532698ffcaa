// Barriers in shared memory that count arrivals and bytes (sm_90; addresses are shared_address of a
// uint64_t).
//
// A phase ends when `count` threads have arrived and all bytes announced have come. The first phase has
// parity 0: waiting for parity p returns once a phase of that parity has ended and the next has not, so that
// waiting for parity 1 returns at once on a new barrier.
#pragma once

#include "cuda/instructions/device.h"

#ifdef PEFTKERN_SIM
#include "sim/instructions/mbarrier.h"
#else

namespace peftkern::cuda {

PEFTKERN_DEVICE void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Before other threads, the cluster's or the TMA unit use barriers that this thread initialised; a block's
// threads need a sync_threads besides.
PEFTKERN_DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

PEFTKERN_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// At the barrier that block `rank` of the cluster has at the same place. What this thread wrote or read
// before is done for those that wait there with mbarrier_wait_cluster.
PEFTKERN_DEVICE void mbarrier_arrive_cluster(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// The same for what ordinary loads and stores have no part in, as a slot that wgmma reads and copies fill: it
// orders none of them, which at the scope of a cluster takes a fence of the whole device each time. Waited
// for with mbarrier_wait.
PEFTKERN_DEVICE void mbarrier_arrive_unordered(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Arrives, and announces bytes that copies will bring.
PEFTKERN_DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

PEFTKERN_DEVICE bool mbarrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

PEFTKERN_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_test(barrier, parity)) {
  }
}

// The same where threads of other blocks arrive.
PEFTKERN_DEVICE bool mbarrier_test_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

PEFTKERN_DEVICE void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_test_cluster(barrier, parity)) {
  }
}

}  // namespace peftkern::cuda
#endif
