// Copies by the TMA unit.
#include <cstring>
#include <new>

#include "cuda/instructions/tma.h"
#include "sim/async.h"
#include "sim/core.h"
#include "sim/memory_model.h"

namespace peftkern::cuda {

const char* encode_tensor_map(const TensorMapShape& s, TensorMap* map) {
  if (reinterpret_cast<uintptr_t>(s.data) % 16 != 0 || s.row_stride % 8 != 0) return "cudaErrorInvalidValue";
  if (s.rows <= 0 || s.columns <= 0 || s.box_rows == 0 || s.box_rows > 256) return "cudaErrorInvalidValue";
  if (s.box_columns % 8 != 0 || s.box_columns == 0 || s.box_columns > 256) return "cudaErrorInvalidValue";
  if (s.swizzle && s.box_columns > 64) return "cudaErrorInvalidValue";
  static_assert(sizeof(sim::TileSource) <= sizeof(TensorMap));
  new (map->opaque) sim::TileSource{static_cast<const unsigned char*>(s.data),
                                    s.rows,
                                    s.columns,
                                    s.row_stride,
                                    s.box_rows,
                                    s.box_columns,
                                    s.swizzle};
  return nullptr;
}

}  // namespace peftkern::cuda

namespace sim {

namespace {

void load_into(Block* block, uint32_t dst, const TileSource& source, uint32_t barrier, int row, int column) {
  const TileSource s = source;
  if (block->exited) fail("tile_load: block %u of the cluster has exited", block->cluster_rank);
  const size_t row_bytes = s.swizzle ? 128 : 2 * s.box_columns, bytes = row_bytes * s.box_rows;
  if (s.swizzle && s.box_columns != 64)
    fail("tile_load: swizzled rows of less than 128 bytes are not modelled");
  unsigned char* to = shared_pointer(block, dst, bytes, 128, "tile_load");
  barrier_from_outside(block, barrier, "tile_load");
  std::memset(to, kPoison, bytes);
  std::memset(async_view(block) + (to - block->shared), kPoison, bytes);
  const auto complete = [=] {
    for (uint32_t i = 0; i < s.box_rows; ++i) {
      for (uint32_t j = 0; j < s.box_columns; j += 8) {
        uint16_t values[8] = {};
        for (int e = 0; e < 8; ++e) {
          const int64_t r = int64_t{row} + i, c = int64_t{column} + j + e;
          if (r >= 0 && r < s.rows && c >= 0 && c < s.columns) {
            std::memcpy(&values[e], s.data + 2 * (r * s.row_stride + c), 2);
          }
        }
        uint32_t address = dst + static_cast<uint32_t>(i * row_bytes + 2 * j);
        if (s.swizzle) address ^= (address >> 7 & 7) << 4;
        unsigned char* there = shared_pointer(block, address, 16, 16, "tile_load");
        std::memcpy(there, values, 16);
        std::memcpy(async_view(block) + (there - block->shared), values, 16);
      }
    }
    barrier_complete(block, barrier, static_cast<int64_t>(bytes));
  };
  add_bulk({complete, block, "a bulk copy", nullptr});
}

}  // namespace

void tile_load(uint32_t dst, const TileSource& source, uint32_t barrier, int row, int column,
               unsigned blocks) {
  maybe_yield();
  check_read(source.data, "tile_load");
  const Cluster& cluster = *self->block->cluster;
  if (blocks == 0) return load_into(self->block, dst, source, barrier, row, column);
  if (blocks >> cluster.size != 0) fail("tile_load: blocks %#x of a cluster of %u", blocks, cluster.size);
  for (unsigned rank = 0; rank < cluster.size; ++rank) {
    if (blocks >> rank & 1) load_into(cluster.blocks[rank], dst, source, barrier, row, column);
  }
}

}  // namespace sim
