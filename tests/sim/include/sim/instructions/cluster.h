// Blocks of a cluster, and the host bodies of cuda/cluster.h.
#pragma once

#include "sim/instructions/device.h"

namespace sim {

void cluster_arrive(bool release);
void cluster_wait();
uint32_t cluster_address(uint32_t address, uint32_t rank);
void cluster_load(uint32_t address, void* value, int bytes);
void cluster_store(uint32_t address, const void* value, int bytes);
void cluster_store_async(uint32_t address, const void* value, int bytes, uint32_t barrier);

}  // namespace sim

namespace peftkern::cuda {

constexpr bool kHasClusters = true;

PEFTKERN_DEVICE void cluster_arrive() {
  ::sim::cluster_arrive(true);
}
PEFTKERN_DEVICE void cluster_arrive_relaxed() {
  ::sim::cluster_arrive(false);
}
PEFTKERN_DEVICE void cluster_wait() {
  ::sim::cluster_wait();
}
PEFTKERN_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
PEFTKERN_DEVICE uint32_t cluster_rank() {
  return ::sim::self->block->cluster_rank;
}
PEFTKERN_DEVICE uint32_t cluster_address(uint32_t address, uint32_t rank) {
  return ::sim::cluster_address(address, rank);
}

template <class T>
PEFTKERN_DEVICE T cluster_load(uint32_t address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
  ::sim::cluster_load(address, &value, sizeof(T));
  return value;
}

template <class T>
PEFTKERN_DEVICE void cluster_store(uint32_t address, const T& value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  ::sim::cluster_store(address, &value, sizeof(T));
}

template <class T>
PEFTKERN_DEVICE void cluster_store_async(uint32_t address, const T& value, uint32_t barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  ::sim::cluster_store_async(address, &value, sizeof(T), barrier);
}

}  // namespace peftkern::cuda
