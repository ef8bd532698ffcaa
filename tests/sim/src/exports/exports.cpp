// What Python calls.
#include "peftkern/cuda.h"
#include "sim/core.h"
#include "sim/memory_model.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void sim_configure(uint64_t seed, int schedule, int completion, unsigned resident, unsigned last) {
  sim::configure(
      {seed, static_cast<sim::Schedule>(schedule), static_cast<sim::Completion>(completion), resident, last});
}

EXPORT void* sim_allocate(size_t bytes, size_t alignment, int at_end) {
  return sim::allocate(bytes, alignment, at_end != 0);
}

EXPORT void* sim_allocate_rows(size_t first, size_t rows, size_t bytes, size_t stride, size_t alignment) {
  return sim::allocate_rows(first, rows, bytes, stride, alignment);
}

EXPORT int sim_release(void* p) {
  return sim::release(p);
}

EXPORT void sim_written_before(void* p) {
  sim::written_before(p);
}

EXPORT const char* sim_dropout_mask(const int64_t* seed, int64_t M, int64_t K, uint32_t threshold,
                                    uint8_t* out) {
  return peftkern::cuda::dropout_mask(seed, M, K, threshold, out, nullptr);
}
