// Parallel regions, with and without OpenMP.
#pragma once

#include "cpu/common/simd.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace peftkern::cpu::PEFTKERN_LEVEL {

// body() on each of the threads, which share out its `omp for` loops. A region of one thread would cost
// several system calls, as much as the kernels of a small layer: its loops belong to the thread that is here.
template <class Body>
static void parallel(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 || omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    body();
    return;
  }
#endif
  body();
}

PEFTKERN_INLINE int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
