// Global memory: vector loads and stores with a say in the caches, and values that pass between blocks.
// T is 4, 8 or 16 bytes and p aligned to it.
#pragma once

#include "cuda/instructions/device.h"

#ifdef PEFTKERN_SIM
#include "sim/instructions/memory.h"
#else

namespace peftkern::cuda {

// Read once, by one block, and constant while the kernel runs: does not displace what L1 holds.
template <class T>
PEFTKERN_DEVICE T load_once(const T* p) {
  detail::Words<T> w;
  if constexpr (sizeof(T) == 16) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
                 : "l"(p));
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(w.word[0]), "=r"(w.word[1])
                 : "l"(p));
  } else {
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(w.word[0]) : "l"(p));
  }
  return w.value;
}

// Brings memory to L2 and waits for nothing; sm_90. p is aligned to 16 bytes, and bytes a multiple of 16.
PEFTKERN_DEVICE void prefetch_bulk(const void* p, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
}

// Written by this launch for another block of it. Others see the value once this thread, or one behind a
// common barrier, has passed fence_device and the reader knows of it through an atomic; they read it with
// load_published.
template <class T>
PEFTKERN_DEVICE void store_published(T* p, const T& value) {
  detail::Words<T> w;
  w.value = value;
  if constexpr (sizeof(T) == 16) {
    asm volatile("st.global.cg.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w.word[0]), "r"(w.word[1]),
                 "r"(w.word[2]), "r"(w.word[3])
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.global.cg.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(w.word[0]), "r"(w.word[1]) : "memory");
  } else {
    asm volatile("st.global.cg.u32 [%0], %1;" ::"l"(p), "r"(w.word[0]) : "memory");
  }
}

// From L2, where other blocks' stores are.
template <class T>
PEFTKERN_DEVICE T load_published(const T* p) {
  detail::Words<T> w;
  if constexpr (sizeof(T) == 16) {
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
                 : "l"(p)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];"
                 : "=r"(w.word[0]), "=r"(w.word[1])
                 : "l"(p)
                 : "memory");
  } else {
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(w.word[0]) : "l"(p) : "memory");
  }
  return w.value;
}

}  // namespace peftkern::cuda
#endif
