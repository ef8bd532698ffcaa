// Launches that may begin before the one before them has ended. With a `bug` other than 0 they have that bug.
#include "cuda/instructions/copy_async.h"
#include "cuda/instructions/launch.h"
#include "cuda/instructions/mbarrier.h"
#include "cuda/instructions/memory.h"
#include "cuda/instructions/sync.h"
#include "cuda/instructions/tma.h"
#include "export.h"

namespace peftkern::cuda {
namespace {

enum DependentBug {
  kDependentCorrect,
  kNoWait,
  kOneThreadDoesNotWait,
  kReadsBeforeWait,
  kCopiesBeforeWait,
  kLoadsTileBeforeWait,
  kWritesBeforeWait,
  kPublishesBeforeWait,
  kCountsBeforeWait,
  kReadsTheOneBeforeThat,
};

__global__ void double_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t i = blockIdx.x * 32 + threadIdx.x;
  out[i] = 2 * in[i];
}

// Launches that depend on the one before: each may read `in` and write `out` behind the wait only, and do
// what it likes with `constant` and its own shared memory. The second one is also behind the launch that made
// `first`.
__global__ void dependent_kernel(const uint32_t* in, const uint32_t* first, const uint32_t* constant,
                                 const __grid_constant__ TensorMap map, uint32_t* out, int bug) {
  auto* mine = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t t = threadIdx.x, to = shared_address(mine + t), barrier = shared_address(mine + 32);
  if (t == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
  }
  sync_threads();
  const uint32_t* from = bug == kReadsBeforeWait         ? in + t
                         : bug == kReadsTheOneBeforeThat ? first + t
                                                         : constant + t;
  const uint32_t value = *from;
  if (bug == kLoadsTileBeforeWait && t == 0) {
    mbarrier_arrive_expect(barrier, 32);
    tile_load(shared_address(mine + 64), &map, barrier, 0, 0);
    mbarrier_wait(barrier, 0);
  }
  copy_async<4>(to, bug == kCopiesBeforeWait ? in + t : constant + t);
  copy_commit();
  copy_wait<0>();
  if (bug == kWritesBeforeWait) out[t] = 0;
  if (bug == kPublishesBeforeWait) store_published(out + t, 0u);
  if (bug == kCountsBeforeWait) atomic_add(out + t, 1);
  if (bug == kNoWait || (bug == kOneThreadDoesNotWait && t == 0)) return;
  grid_wait();
  out[t] = in[t] + value + mine[t];
}

}  // namespace
}  // namespace peftkern::cuda

using namespace peftkern::cuda;

PEFTKERN_EXPORT const char* sim_double(const uint32_t* in, uint32_t* out, unsigned count, int dependent) {
  Launch how{{count / 32}, {32}};
  how.dependent = dependent != 0;
  return launch(how, double_kernel, in, out);
}

// first = 2 in, second = first + 2 constant, out = second + 2 constant, 32 values each.
PEFTKERN_EXPORT const char* sim_dependent(const uint32_t* in, const uint32_t* constant, uint32_t* first,
                                          uint32_t* second, uint32_t* out, int bug) {
  TensorMap map;
  if (const char* error = encode_tensor_map({first, false, 1, 16, 64, 1, 16, false}, &map)) return error;
  Launch how{{1}, {32}, 384};
  if (const char* error = launch(how, double_kernel, in, first)) return error;
  how.dependent = true;
  if (const char* error = launch(how, dependent_kernel, first, first, constant, map, second,
                                 bug == kReadsTheOneBeforeThat ? 0 : bug))
    return error;
  return launch(how, dependent_kernel, second, first, constant, map, out, bug);
}
