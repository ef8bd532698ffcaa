// cuda/split.h, one pair of values a thread.
#include "cuda/common/split.h"

#include "cuda/instructions/launch.h"
#include "export.h"

namespace peftkern::cuda {
namespace {

// out (count / 2, Terms)
template <int Terms>
__global__ void split_kernel(const float* values, int count, uint32_t* out) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (2 * i >= count) return;
  uint32_t terms[Terms];
  split<Terms>(values[2 * i], values[2 * i + 1], terms);
  for (int j = 0; j < Terms; ++j) out[Terms * i + j] = terms[j];
}

__global__ void split_f16_kernel(const uint32_t* words, int count, uint32_t* out) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  uint32_t terms[2];
  split_f16(words[i], terms);
  for (int j = 0; j < 2; ++j) out[2 * i + j] = terms[j];
}

}  // namespace
}  // namespace peftkern::cuda

using namespace peftkern::cuda;

PEFTKERN_EXPORT const char* sim_split(int terms, const float* values, int count, uint32_t* out) {
  const auto kernel = terms == 1 ? split_kernel<1> : terms == 2 ? split_kernel<2> : split_kernel<3>;
  return launch({{static_cast<unsigned>((count + 127) / 128)}, {64}}, kernel, values, count, out);
}

PEFTKERN_EXPORT const char* sim_split_f16(const uint32_t* words, int count, uint32_t* out) {
  return launch({{static_cast<unsigned>((count + 63) / 64)}, {64}}, split_f16_kernel, words, count, out);
}
