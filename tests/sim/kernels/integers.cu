// cuda/integers.h, one pair of values a thread.
#include "cuda/instructions/integers.h"

#include "cuda/instructions/launch.h"
#include "export.h"

namespace peftkern::cuda {
namespace {

__global__ void multiply_wide_kernel(const uint32_t* pairs, int count, uint64_t* out) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) out[i] = multiply_wide(pairs[2 * i], pairs[2 * i + 1]);
}

}  // namespace
}  // namespace peftkern::cuda

using namespace peftkern::cuda;

PEFTKERN_EXPORT const char* sim_multiply_wide(const uint32_t* pairs, int count, uint64_t* out) {
  return launch({{static_cast<unsigned>((count + 63) / 64)}, {64}}, multiply_wide_kernel, pairs, count, out);
}
