// What the tests of the segmented branch call.
#include "peftkern/cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using peftkern::DType;
using peftkern::cuda::SgmvArgs;

// Sizes are in `sizes`: dtype, adapter dtype, out_row, x_row, M, N, K, slots, max_rank, dependent, arch,
// tensors, vectors, src_row, bias dtype. `addresses`: of the tensors, then of the vectors.
static SgmvArgs read(const int64_t* sizes, void* out, const void* x, const uint64_t* addresses,
                     const int64_t* table, const float* scaling, const int32_t* order,
                     const int32_t* starts) {
  SgmvArgs args{};
  args.dtype = static_cast<DType>(sizes[0]);
  args.adapter_dtype = static_cast<DType>(sizes[1]);
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
  args.tensor_count = sizes[11];
  args.vector_count = sizes[12];
  args.src_row = sizes[13];
  args.bias_dtype = static_cast<DType>(sizes[14]);
  args.tensors = addresses;
  args.vectors = args.vector_count > 0 ? addresses + args.tensor_count : nullptr;
  args.table = table;
  args.scaling = scaling;
  args.order = order;
  args.starts = starts;
  return args;
}

EXPORT const char* sim_sgmv_add(const int64_t* sizes, void* out, const void* x, const uint64_t* addresses,
                                const int64_t* table, const float* scaling, const int32_t* order,
                                const int32_t* starts, float* u, float* partial, uint32_t* counters,
                                const void* src, const void* bias) {
  SgmvArgs args = read(sizes, out, x, addresses, table, scaling, order, starts);
  args.u = u;
  args.partial = partial;
  args.counters = counters;
  args.src = src;
  args.bias = bias;
  return peftkern::cuda::sgmv_add(args);
}

EXPORT const char* sim_scale_rows(const int64_t* sizes, void* out, const void* x, const uint64_t* addresses,
                                  const int64_t* table, const int32_t* order, const int32_t* starts) {
  return peftkern::cuda::scale_rows(read(sizes, out, x, addresses, table, nullptr, order, starts));
}

EXPORT int64_t sim_sgmv_partials(int64_t M, int64_t K, int64_t max_rank, int dtype, int arch) {
  return peftkern::cuda::sgmv_partials(M, K, max_rank, static_cast<DType>(dtype), arch);
}

EXPORT int64_t sim_sgmv_counters(int64_t M, int64_t max_rank, int dtype, int arch) {
  return peftkern::cuda::sgmv_counters(M, max_rank, static_cast<DType>(dtype), arch);
}
