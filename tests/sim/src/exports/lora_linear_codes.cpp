// What Python calls: the linear layer over a weight in codes, its arguments as they are.
#include "peftkern/cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int sim_lora_linear_codes_takes(const peftkern::cuda::LoraLinearArgs* args,
                                       const peftkern::Quantised* weight) {
  return peftkern::cuda::lora_linear_codes_takes(*args, *weight) ? 1 : 0;
}

EXPORT const char* sim_lora_linear_codes(const peftkern::cuda::LoraLinearArgs* args,
                                         const peftkern::Quantised* weight, int64_t dependent) {
  return peftkern::cuda::lora_linear_codes(*args, *weight, dependent != 0);
}
