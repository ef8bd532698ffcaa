// Host bodies of cuda/tma.h.
#pragma once

#include "sim/instructions/device.h"

namespace sim {

// What the simulator keeps in a TensorMap.
struct TileSource {
  const unsigned char* data;
  int64_t rows, columns, row_stride;
  uint32_t box_rows, box_columns;
  bool swizzle;
};

// `blocks`: ranks of the cluster, one bit each; 0 for the calling block alone.
void tile_load(uint32_t dst, const TileSource& source, uint32_t barrier, int row, int column,
               unsigned blocks);

}  // namespace sim

namespace peftkern::cuda {

PEFTKERN_DEVICE void tensor_map_prefetch(const TensorMap*) {}

PEFTKERN_DEVICE void tile_load(uint32_t dst, const TensorMap* map, uint32_t barrier, int row, int column) {
  ::sim::tile_load(dst, *reinterpret_cast<const ::sim::TileSource*>(map->opaque), barrier, row, column, 0);
}

PEFTKERN_DEVICE void tile_load_multicast(uint32_t dst, const TensorMap* map, uint32_t barrier, int row,
                                         int column, uint16_t blocks) {
  if (blocks == 0) ::sim::fail("tile_load_multicast to no block");
  ::sim::tile_load(dst, *reinterpret_cast<const ::sim::TileSource*>(map->opaque), barrier, row, column,
                   blocks);
}

}  // namespace peftkern::cuda
