// Host bodies of cuda/memory.h.
#pragma once

#include <cstring>

#include "sim/instructions/device.h"
#include "sim/memory_model.h"

namespace peftkern::cuda {

template <class T>
PEFTKERN_DEVICE T load_once(const T* p) {
  ::sim::check_aligned(p, sizeof(T), "a vector load");
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

PEFTKERN_DEVICE void prefetch_bulk(const void* p, uint32_t bytes) {
  ::sim::check_aligned(p, 16, "a bulk prefetch");
  if (bytes == 0 || bytes % 16 != 0) ::sim::fail("a bulk prefetch of %u bytes", bytes);
  // Nothing but the fault that memory outside of every buffer would give.
  const auto* first = static_cast<const volatile unsigned char*>(p);
  static_cast<void>(first[0] + first[bytes - 1]);
}

template <class T>
PEFTKERN_DEVICE void store_published(T* p, const T& value) {
  ::sim::check_aligned(p, sizeof(T), "a vector store");
  ::sim::store_late(p, &value, sizeof(T));
}

template <class T>
PEFTKERN_DEVICE T load_published(const T* p) {
  ::sim::check_aligned(p, sizeof(T), "a vector load");
  T value;
  ::sim::load_late(p, &value, sizeof(T));
  return value;
}

}  // namespace peftkern::cuda
