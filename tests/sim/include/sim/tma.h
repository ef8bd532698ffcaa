// Host bodies of cuda/tma.h.
#pragma once

#include "sim/device.h"

namespace sim {

// What the simulator keeps in a TensorMap.
struct TileSource {
  const unsigned char* data;
  int64_t rows, columns, row_stride;
  uint32_t box_rows, box_columns;
  bool swizzle;
};

void tile_load(uint32_t dst, const TileSource& source, uint32_t barrier, int row, int column);

}  // namespace sim

namespace peftkern::cuda {

PEFTKERN_DEVICE void tensor_map_prefetch(const TensorMap*) {}

PEFTKERN_DEVICE void tile_load(uint32_t dst, const TensorMap* map, uint32_t barrier, int row, int column) {
  ::sim::tile_load(dst, *reinterpret_cast<const ::sim::TileSource*>(map->opaque), barrier, row, column);
}

}  // namespace peftkern::cuda
