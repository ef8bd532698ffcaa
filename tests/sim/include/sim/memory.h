// Host bodies of cuda/memory.h.
#pragma once

#include <cstring>

#include "sim/device.h"
#include "sim/memory_model.h"

namespace peftkern::cuda {

template <class T>
PEFTKERN_DEVICE T load_once(const T* p) {
  ::sim::check_aligned(p, sizeof(T), "a vector load");
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
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
