// Host bodies of cuda/wgmma.h.
#pragma once

#include "cuda/instructions/convert.h"
#include "sim/async.h"
#include "sim/instructions/device.h"

namespace peftkern::cuda {
namespace detail {

template <class T>
float value_of(uint16_t bits) {
  return to_float(T{bits});
}

}  // namespace detail

PEFTKERN_DEVICE void wgmma_fence() {
  ::sim::product_fence();
}
PEFTKERN_DEVICE void wgmma_commit() {
  ::sim::product_commit();
}
template <int Left>
PEFTKERN_DEVICE void wgmma_wait() {
  ::sim::product_wait(Left);
}

template <class T, int N, bool ColumnsA = false, bool ColumnsB = false>
PEFTKERN_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  ::sim::product_issue({d, nullptr, a, b, N, ColumnsA, ColumnsB, accumulate, detail::value_of<T>});
}

template <class T, int N, bool ColumnsB = false>
PEFTKERN_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  ::sim::product_issue({d, a, 0, b, N, false, ColumnsB, accumulate, detail::value_of<T>});
}

}  // namespace peftkern::cuda
