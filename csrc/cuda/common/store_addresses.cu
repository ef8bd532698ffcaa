// Addresses that the host knows, written into device memory without a copy that anyone waits for: they travel
// as an argument of the launch, which a CUDA graph keeps.
#include "cuda/instructions/launch.h"
#include "peftkern/cuda.h"

namespace peftkern::cuda {
namespace {

constexpr int kEach = 256;

struct Addresses {
  uint64_t value[kEach];
};

__global__ void __launch_bounds__(kEach)
    store_addresses_kernel(const __grid_constant__ Addresses from, int count, uint64_t* out) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) out[i] = from.value[i];
}

}  // namespace

const char* store_addresses(const uint64_t* host, int64_t count, uint64_t* out, void* stream) {
  for (int64_t first = 0; first < count; first += kEach) {
    const int left = static_cast<int>(count - first < kEach ? count - first : kEach);
    Addresses some{};
    for (int i = 0; i < left; ++i) some.value[i] = host[first + i];
    const Launch how{{1}, {kEach}, 0, stream};
    if (const char* error = launch(how, store_addresses_kernel, some, left, out + first)) return error;
  }
  return nullptr;
}

}  // namespace peftkern::cuda
