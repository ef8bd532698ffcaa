// Copies of 2D tiles by the TMA unit (sm_90).
//
// A tile lies in shared memory row after row, box_columns elements each. With 128-byte swizzle a row is at
// most 128 bytes, rows are 128 bytes apart, and bits 4 to 6 of every address are exchanged with their
// exclusive or with bits 7 to 9: the layout that wgmma reads. What lies outside the matrix arrives as zeros,
// and its bytes count.
#pragma once

#include "cuda/instructions/device.h"

namespace peftkern::cuda {

// A matrix in global memory, for tiles. Given to kernels as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

struct TensorMapShape {
  void* data;                         // aligned to 16 bytes
  bool is_f16;                        // else bf16
  int64_t rows, columns, row_stride;  // in elements; row_stride is a multiple of 8
  uint32_t box_rows, box_columns;     // of a tile
  bool swizzle;                       // 128 bytes; else none
};

// On the host. Returns null, or what is wrong.
const char* encode_tensor_map(const TensorMapShape& shape, TensorMap* map);

}  // namespace peftkern::cuda

#ifdef PEFTKERN_SIM
#include "sim/instructions/tma.h"
#else

namespace peftkern::cuda {

PEFTKERN_DEVICE void tensor_map_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// By one thread. The tile whose first element is (row, column) goes to `dst`; its bytes arrive at `barrier`.
PEFTKERN_DEVICE void tile_load(uint32_t dst, const TensorMap* map, uint32_t barrier, int row, int column) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// The same into every block of the cluster whose bit (1 << rank) is set in `blocks`: the tile goes to the
// same place in each, and its bytes arrive at each one's own barrier in the same place, which expects them.
PEFTKERN_DEVICE void tile_load_multicast(uint32_t dst, const TensorMap* map, uint32_t barrier, int row,
                                         int column, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

}  // namespace peftkern::cuda
#endif
