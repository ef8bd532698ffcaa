// What the tests of lora_linear_sm80 call.
#include "cuda/lora_linear/lora_linear_sm80.h"
#include "peftkern/cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Sizes: dtype, adapter dtype, bias dtype, M, N, K, R, rows of x, w and out, w_by_row, strides of b,
// threshold, multiprocessors. numbers: scaling, keep_scale. tensors: x, w, out, v, b, d, g_b, g_d, bias,
// seed.
peftkern::cuda::LoraLinearArgs arguments(const int64_t* sizes, const float* numbers, void* const* tensors) {
  using peftkern::DType;
  peftkern::cuda::LoraLinearArgs args{};
  const auto dtype = static_cast<DType>(sizes[0]);
  args.bias_dtype = static_cast<DType>(sizes[2]);
  args.M = sizes[3];
  args.N = sizes[4];
  args.K = sizes[5];
  args.R = sizes[6];
  args.x = {tensors[0], dtype, sizes[7], 1};
  args.w = {tensors[1], dtype, sizes[8], 1};
  args.out = {tensors[2], dtype, sizes[9], 1};
  args.w_by_row = sizes[10] != 0;
  args.v = static_cast<float*>(tensors[3]);
  args.b = {tensors[4], static_cast<DType>(sizes[1]), sizes[11], sizes[12]};
  args.scaling = numbers[0];
  args.scales.d = static_cast<const float*>(tensors[5]);
  args.scales.g_b = static_cast<const float*>(tensors[6]);
  args.scales.g_d = static_cast<const float*>(tensors[7]);
  args.bias = tensors[8];
  args.dropout = {static_cast<const int64_t*>(tensors[9]), static_cast<uint32_t>(sizes[13]), numbers[1]};
  args.multiprocessors = static_cast<int>(sizes[14]);
  return args;
}

}  // namespace

EXPORT const char* sim_lora_linear_sm80(const int64_t* sizes, const float* numbers, void* const* tensors) {
  return peftkern::cuda::lora_linear_sm80(arguments(sizes, numbers, tensors));
}

EXPORT int sim_lora_linear_sm80_takes(const int64_t* sizes, const float* numbers, void* const* tensors) {
  return peftkern::cuda::lora_linear_sm80_takes(arguments(sizes, numbers, tensors));
}

// 0: large, 1: medium, 2: small.
EXPORT int sim_lora_linear_sm80_tile(int64_t M, int64_t N, int64_t multiprocessors) {
  return static_cast<int>(peftkern::cuda::linear_tile(M, N, static_cast<int>(multiprocessors)));
}
