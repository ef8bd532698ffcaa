// One kernel per Hopper instruction: operands from memory, results to memory. The tests know the layouts.
#include "cuda/instructions/cluster.h"
#include "cuda/instructions/launch.h"
#include "cuda/instructions/mbarrier.h"
#include "cuda/instructions/sync.h"
#include "cuda/instructions/tma.h"
#include "cuda/instructions/wgmma.h"
#include "export.h"

namespace peftkern::cuda {
namespace {

constexpr int kTileBytes = 48 * 1024;

// Shared memory from its first multiple of 1024 on, as swizzled tiles need it.
PEFTKERN_DEVICE unsigned char* aligned_shared() {
  unsigned char* shared = shared_memory();
  return shared + (1024 - shared_address(shared) % 1024) % 1024;
}

struct WgmmaCase {
  uint32_t a_offset, b_offset, stride_a, leading_a, stride_b, leading_b;
  int accumulate;
  int fences;  // whether threads pass fence_async_proxy, as they must
};

// image: what shared memory holds; registers_a (128, 4) or null; d (128, N / 2): a thread's registers in each
// row.
template <class T, int N, bool ColumnsA, bool ColumnsB>
__global__ void __launch_bounds__(128)
    wgmma_kernel(const uint32_t* image, WgmmaCase which, const uint32_t* registers_a, float* d) {
  auto* shared = reinterpret_cast<uint32_t*>(aligned_shared());
  const unsigned t = threadIdx.x;
  for (unsigned i = t; i < kTileBytes / 4; i += 128) shared[i] = image[i];
  if (which.fences) fence_async_proxy();
  sync_threads();
  float sums[N / 2];
  for (int i = 0; i < N / 2; ++i) sums[i] = d[t * (N / 2) + i];
  const uint32_t base = shared_address(shared);
  const uint64_t a = wgmma_descriptor(base + which.a_offset, which.stride_a, which.leading_a);
  const uint64_t b = wgmma_descriptor(base + which.b_offset, which.stride_b, which.leading_b);
  wgmma_fence();
  if (registers_a != nullptr) {
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) words[i] = registers_a[4 * t + i];
    wgmma<T, N, ColumnsB>(sums, words, b, which.accumulate != 0);
  } else {
    wgmma<T, N, ColumnsA, ColumnsB>(sums, a, b, which.accumulate != 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) d[t * (N / 2) + i] = sums[i];
}

// out: shared memory after the tile at (row, column) has come.
__global__ void tile_kernel(const __grid_constant__ TensorMap map, int row, int column, int bytes,
                            unsigned char* out) {
  unsigned char* shared = aligned_shared();
  const uint32_t barrier = shared_address(shared + kTileBytes);
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&map);
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier, static_cast<uint32_t>(bytes));
    tile_load(shared_address(shared), &map, barrier, row, column);
  }
  sync_threads();
  mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += static_cast<int>(blockDim.x))
    out[i] = shared[i];
}

// Warp 0 hands `rounds` values to warp 1 through one slot and two barriers.
__global__ void phases_kernel(int rounds, uint32_t* out) {
  unsigned char* shared = aligned_shared();
  auto* slot = reinterpret_cast<uint32_t*>(shared);
  const uint32_t full = shared_address(shared + 256), empty = full + 8;
  const uint32_t lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 32);
    mbarrier_init(empty, 32);
    mbarrier_init_fence();
  }
  sync_threads();
  for (int i = 0; i < rounds; ++i) {
    const uint32_t parity = static_cast<uint32_t>(i) % 2;
    if (threadIdx.x < 32) {
      mbarrier_wait(empty, parity ^ 1);
      slot[lane] = static_cast<uint32_t>(i) * 100 + lane;
      mbarrier_arrive(full);
    } else {
      while (!mbarrier_test(full, parity)) {
      }
      out[static_cast<uint32_t>(i) * 32 + lane] = slot[31 - lane];
      mbarrier_arrive(empty);
    }
  }
}

// Blocks of a cluster write, meet, and read what the next block wrote. The registers move between warpgroups.
__global__ void __launch_bounds__(256) cluster_kernel(uint32_t* memory, uint32_t* out) {
  if (threadIdx.x < 128) {
    registers_decrease<40>();
  } else {
    registers_increase<232>();
  }
  grid_wait();
  const unsigned t = threadIdx.x, size = 4, first = blockIdx.x - cluster_rank();
  memory[blockIdx.x * blockDim.x + t] = blockIdx.x * 1000 + t;
  cluster_arrive();
  cluster_wait();
  out[blockIdx.x * blockDim.x + t] = memory[(first + (cluster_rank() + 1) % size) * blockDim.x + t];
  grid_launch_dependents();
}

// One kernel for each size; the layouts are spread over them.
template <class T>
auto choose(int n) {
  switch (n) {
    case 16:
      return wgmma_kernel<T, 16, false, false>;
    case 32:
      return wgmma_kernel<T, 32, true, false>;
    case 64:
      return wgmma_kernel<T, 64, false, true>;
    case 128:
      return wgmma_kernel<T, 128, true, true>;
    default:
      return wgmma_kernel<T, 256, false, false>;
  }
}

}  // namespace
}  // namespace peftkern::cuda

using namespace peftkern::cuda;

PEFTKERN_EXPORT const char* sim_wgmma(int is_f16, int n, const uint32_t* image, const WgmmaCase* which,
                                      const uint32_t* registers_a, float* d) {
  const auto kernel = is_f16 ? choose<peftkern::f16>(n) : choose<peftkern::bf16>(n);
  return launch({{1}, {128}, kTileBytes + 1024}, kernel, image, *which, registers_a, d);
}

PEFTKERN_EXPORT const char* sim_tile(uint16_t* data, int rows, int columns, int row_stride, int box_rows,
                                     int box_columns, int swizzle, int row, int column, unsigned char* out) {
  TensorMap map;
  const TensorMapShape shape{data,
                             false,
                             rows,
                             columns,
                             row_stride,
                             static_cast<uint32_t>(box_rows),
                             static_cast<uint32_t>(box_columns),
                             swizzle != 0};
  const char* error = encode_tensor_map(shape, &map);
  if (error != nullptr) return error;
  return launch({{1}, {64}, kTileBytes + 2048}, tile_kernel, map, row, column, box_rows * box_columns * 2,
                out);
}

PEFTKERN_EXPORT const char* sim_phases(int rounds, uint32_t* out) {
  return launch({{1}, {64}, 2048}, phases_kernel, rounds, out);
}

PEFTKERN_EXPORT const char* sim_cluster(uint32_t* memory, uint32_t* out) {
  Launch how{{8}, {256}};
  how.cluster = 4;
  how.dependent = true;
  return launch(how, cluster_kernel, memory, out);
}
