// lora_row_norm for Python.
#include "peftkern/cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t sim_lora_row_norm_partials(int64_t N, int64_t K, int64_t R) {
  return peftkern::cuda::lora_row_norm_partials(N, K, R);
}

// sizes: dtype, N, K, R, row stride of w, dtype of a and b, row and column stride of a, the same of b,
// whether the launches may overlap.
EXPORT const char* sim_lora_row_norm(const int64_t* sizes, const void* w, const void* a, const void* b,
                                     const float* scaling, float* out, float* partial) {
  peftkern::cuda::LoraRowNormArgs args{};
  const auto adapter = static_cast<peftkern::DType>(sizes[5]);
  args.w = {w, static_cast<peftkern::DType>(sizes[0]), sizes[4], 1};
  args.a = {a, adapter, sizes[6], sizes[7]};
  args.b = {b, adapter, sizes[8], sizes[9]};
  args.scaling = *scaling;
  args.N = sizes[1];
  args.K = sizes[2];
  args.R = sizes[3];
  args.out = out;
  args.partial = partial;
  args.dependent = sizes[10] != 0;
  return peftkern::cuda::lora_row_norm(args);
}
