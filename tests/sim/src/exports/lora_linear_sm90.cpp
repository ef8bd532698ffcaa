// What Python calls: the fused linear layer for Hopper, its arguments as they are.
#include "peftkern/cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int sim_lora_linear_sm90_takes(const peftkern::cuda::LoraLinearArgs* args) {
  return peftkern::cuda::lora_linear_sm90_takes(*args) ? 1 : 0;
}

EXPORT const char* sim_lora_linear_sm90(const peftkern::cuda::LoraLinearArgs* args) {
  return peftkern::cuda::lora_linear_sm90(*args);
}

EXPORT int64_t sim_lora_linear_counters(int64_t M) {
  return peftkern::cuda::lora_linear_counters(M);
}
