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

// Sizes are in `sizes`: dtype, adapter dtype, out_row, x_row, M, N, K, slots, max_rank, dependent, arch.
EXPORT const char* sim_sgmv_add(const int64_t* sizes, void* out, const void* x, const uint64_t* tensors,
                                const int64_t* table, const float* scaling, const int32_t* order,
                                const int32_t* starts, float* u, float* partial, uint32_t* counters) {
  peftkern::cuda::SgmvArgs args{};
  args.dtype = static_cast<peftkern::DType>(sizes[0]);
  args.adapter_dtype = static_cast<peftkern::DType>(sizes[1]);
  args.out = out;
  args.out_row = sizes[2];
  args.x = x;
  args.x_row = sizes[3];
  args.M = sizes[4];
  args.N = sizes[5];
  args.K = sizes[6];
  args.slots = sizes[7];
  args.max_rank = sizes[8];
  args.dependent = sizes[9] != 0;
  args.arch = static_cast<int>(sizes[10]);
  args.tensors = tensors;
  args.table = table;
  args.scaling = scaling;
  args.order = order;
  args.starts = starts;
  args.u = u;
  args.partial = partial;
  args.counters = counters;
  return peftkern::cuda::sgmv_add(args);
}

EXPORT int64_t sim_sgmv_partials(int64_t M, int64_t K, int64_t max_rank, int dtype, int arch) {
  return peftkern::cuda::sgmv_partials(M, K, max_rank, static_cast<peftkern::DType>(dtype), arch);
}

EXPORT int64_t sim_sgmv_counters(int64_t M, int64_t max_rank, int dtype, int arch) {
  return peftkern::cuda::sgmv_counters(M, max_rank, static_cast<peftkern::DType>(dtype), arch);
}
