// What the test of store_addresses calls.
#include "peftkern/cuda.h"

extern "C" __attribute__((visibility("default"))) const char* sim_store_addresses(const uint64_t* from,
                                                                                  int64_t count,
                                                                                  uint64_t* out) {
  return peftkern::cuda::store_addresses(from, count, out, nullptr);
}
