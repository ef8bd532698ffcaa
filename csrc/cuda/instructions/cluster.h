// Blocks of a cluster (sm_90): their barrier, and each other's shared memory.
//
// A block's shared memory is there from the first cluster barrier on, which says that all blocks have
// started, until the block exits: whoever is read by others, written or arrived at exits behind one more
// cluster barrier, or after it has waited for the last of them by other means.
#pragma once

#include "cuda/instructions/device.h"

#ifdef PEFTKERN_SIM
#include "sim/instructions/cluster.h"
#else

namespace peftkern::cuda {

// False where code for an older architecture is made: a kernel's body for clusters is then left out.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

// All threads of the cluster, whole warps. What a thread wrote before it arrives is visible to those that
// have waited. Threads that have exited count as arrived.
PEFTKERN_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
PEFTKERN_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Says that this thread has come this far, and nothing about its memory but what mbarrier_init_fence has
// said.
PEFTKERN_DEVICE void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
PEFTKERN_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

PEFTKERN_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Of what lies in block `rank` where `address`, a shared_address of this block, points to here. For the
// functions below alone.
PEFTKERN_DEVICE uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// T is 4, 8 or 16 bytes and the address aligned to it.
template <class T>
PEFTKERN_DEVICE T cluster_load(uint32_t address) {
  detail::Words<T> w;
  if constexpr (sizeof(T) == 16) {
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
                 : "=r"(w.word[0]), "=r"(w.word[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(w.word[0]) : "r"(address) : "memory");
  }
  return w.value;
}

// Others see the value behind a cluster barrier, or behind an mbarrier at which this thread arrives
// afterwards.
template <class T>
PEFTKERN_DEVICE void cluster_store(uint32_t address, const T& value) {
  detail::Words<T> w;
  w.value = value;
  if constexpr (sizeof(T) == 16) {
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(w.word[0]),
                 "r"(w.word[1]), "r"(w.word[2]), "r"(w.word[3])
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(w.word[0]), "r"(w.word[1])
                 : "memory");
  } else {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(w.word[0]) : "memory");
  }
}

// The value arrives some time later, and its bytes then at `barrier`, the cluster_address of an mbarrier of
// the same block, which expects them. The block exits after it has waited for them. T is 4, 8 or 16 bytes.
template <class T>
PEFTKERN_DEVICE void cluster_store_async(uint32_t address, const T& value, uint32_t barrier) {
  detail::Words<T> w;
  w.value = value;
  if constexpr (sizeof(T) == 16) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::
            "r"(address),
        "r"(w.word[0]), "r"(w.word[1]), "r"(w.word[2]), "r"(w.word[3]), "r"(barrier)
        : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1, %2}, [%3];" ::"r"(
            address),
        "r"(w.word[0]), "r"(w.word[1]), "r"(barrier)
        : "memory");
  } else {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address),
        "r"(w.word[0]), "r"(barrier)
        : "memory");
  }
}

}  // namespace peftkern::cuda
#endif
