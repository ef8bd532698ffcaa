// Host bodies of cuda/copy_async.h.
#pragma once

#include "sim/async.h"
#include "sim/instructions/device.h"

namespace peftkern::cuda {

template <int Bytes>
PEFTKERN_DEVICE void copy_async(uint32_t dst, const void* src, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  ::sim::copy_async(dst, src, Bytes, valid);
}

PEFTKERN_DEVICE void copy_commit() {
  ::sim::copy_commit();
}

template <int Left>
PEFTKERN_DEVICE void copy_wait() {
  ::sim::copy_wait(Left);
}

}  // namespace peftkern::cuda
