// Which thread of a parallel region this is, with and without OpenMP.
#pragma once

#include "cpu/common/simd.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace peftkern::cpu::PEFTKERN_LEVEL {

PEFTKERN_INLINE int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
