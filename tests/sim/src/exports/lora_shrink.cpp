// What the tests of lora_shrink call.
#include "peftkern/cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Sizes are in `sizes`: dtype, adapter dtype, M, C, R, stride of in's rows, strides of p, threshold. numbers:
// alpha, keep_scale.
EXPORT const char* sim_lora_shrink(const int64_t* sizes, const float* numbers, const void* in, const void* p,
                                   const float* scale, const float* d, const int64_t* seed, float* out,
                                   float* partial) {
  using peftkern::DType;
  peftkern::cuda::LoraShrinkArgs args{};
  args.in = {in, static_cast<DType>(sizes[0]), sizes[5], 1};
  args.p = {p, static_cast<DType>(sizes[1]), sizes[6], sizes[7]};
  args.scale = scale;
  args.d = d;
  args.alpha = numbers[0];
  args.dropout = {seed, static_cast<uint32_t>(sizes[8]), numbers[1]};
  args.M = sizes[2];
  args.C = sizes[3];
  args.R = sizes[4];
  args.out = out;
  args.partial = partial;
  return peftkern::cuda::lora_shrink(args);
}

EXPORT int64_t sim_lora_shrink_partials(int64_t M, int64_t C, int64_t R, int64_t dtype) {
  return peftkern::cuda::lora_shrink_partials(M, C, R, static_cast<peftkern::DType>(dtype));
}
