// What launches of each kernel have asked for.
#include <dlfcn.h>

#include <algorithm>
#include <map>

#include "cuda/instructions/launch.h"

namespace {

struct Most {
  uint64_t threads = 0, shared = 0;
};
std::map<const void*, Most> launched;

}  // namespace

void sim::note_launch(const void* kernel, const LaunchShape& shape) {
  Most& most = launched[kernel];
  most.threads = std::max(most.threads, uint64_t{shape.block.x} * shape.block.y * shape.block.z);
  most.shared = std::max(most.shared, uint64_t{shape.shared});
}

// Three words for each kernel: where it lies in this library, threads and bytes of shared memory of a block,
// the most so far. Returns how many kernels there are.
extern "C" __attribute__((visibility("default"))) int sim_launches(uint64_t* out, int capacity) {
  int count = 0;
  for (const auto& [kernel, most] : launched) {
    Dl_info library;
    if (count == capacity || dladdr(kernel, &library) == 0) break;
    out[3 * count] =
        static_cast<uint64_t>(static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase));
    out[3 * count + 1] = most.threads;
    out[3 * count++ + 2] = most.shared;
  }
  return count;
}
