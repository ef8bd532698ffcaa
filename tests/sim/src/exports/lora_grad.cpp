// lora_grad for Python.
#include "peftkern/cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// sizes: dtype, M, C, R, row stride of in, dtype, row and column stride of grad, the same of p, whether the
// launches may overlap. numbers: alpha, down_alpha, keep_scale.
peftkern::cuda::LoraGradArgs arguments(const int64_t* sizes, const float* numbers, const void* in,
                                       const float* v, const float* v_scale, const float* column_scale,
                                       void* grad, const void* p, const float* down_scale, float* down,
                                       float* colsum, const int64_t* seed, uint32_t threshold) {
  peftkern::cuda::LoraGradArgs args{};
  args.in = {in, static_cast<peftkern::DType>(sizes[0]), sizes[4], 1};
  args.dropout = {seed, threshold, numbers[2]};
  args.M = sizes[1];
  args.C = sizes[2];
  args.R = sizes[3];
  args.v = v;
  args.v_scale = v_scale;
  args.alpha = numbers[0];
  args.column_scale = column_scale;
  args.grad = {grad, static_cast<peftkern::DType>(sizes[5]), sizes[6], sizes[7]};
  args.p = {p, static_cast<peftkern::DType>(sizes[8]), sizes[9], sizes[10]};
  args.down_scale = down_scale;
  args.down_alpha = numbers[1];
  args.down = down;
  args.colsum = colsum;
  args.dependent = sizes[11] != 0;
  return args;
}

}  // namespace

EXPORT int64_t sim_lora_grad_partials(const int64_t* sizes, const float* numbers, const void* in,
                                      const float* v, const float* v_scale, const float* column_scale,
                                      void* grad, const void* p, const float* down_scale, float* down,
                                      float* colsum, const int64_t* seed, int64_t threshold) {
  return peftkern::cuda::lora_grad_partials(arguments(sizes, numbers, in, v, v_scale, column_scale, grad, p,
                                                      down_scale, down, colsum, seed,
                                                      static_cast<uint32_t>(threshold)));
}

EXPORT const char* sim_lora_grad(const int64_t* sizes, const float* numbers, const void* in, const float* v,
                                 const float* v_scale, const float* column_scale, void* grad, const void* p,
                                 const float* down_scale, float* down, float* colsum, const int64_t* seed,
                                 int64_t threshold, float* partial) {
  peftkern::cuda::LoraGradArgs args =
      arguments(sizes, numbers, in, v, v_scale, column_scale, grad, p, down_scale, down, colsum, seed,
                static_cast<uint32_t>(threshold));
  args.partial = partial;
  return peftkern::cuda::lora_grad(args);
}
