// Tiles of lora_linear_sm80: which there are, how they lie in shared memory, and which one a problem gets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/instructions/launch.h"

namespace peftkern::cuda {

// Rows x Columns of the output for a block, WarpRows x WarpColumns of them for a warp; steps under way:
// Stages.
template <int Rows, int Columns, int WarpRows, int WarpColumns, int Stages, int Blocks>
struct LinearTile {
  static constexpr int kRows = Rows, kColumns = Columns, kWarpRows = WarpRows, kWarpColumns = WarpColumns;
  static constexpr int kStages = Stages, kBlocks = Blocks;  // of a multiprocessor
  static constexpr int kWarpsAcross = Columns / WarpColumns;
  static constexpr int kThreads = Rows / WarpRows * kWarpsAcross * 32;
  static constexpr int kStageBytes = (Rows + Columns) * 64;
  static constexpr size_t kShared = size_t{Stages} * kStageBytes;
  static_assert(kShared >= size_t{Rows} * Columns * 2, "the output passes through the same memory");
  static_assert(kShared <= kSharedAnywhere);
};

using LargeTile = LinearTile<128, 256, 64, 64, 4, 1>;
using MediumTile = LinearTile<128, 128, 64, 32, 4, 1>;
using SmallTile = LinearTile<64, 64, 32, 32, 6, 2>;

enum class LinearTileSize { large, medium, small };

// The one that is done first, by the number of waves and the time that a tile takes.
inline LinearTileSize linear_tile(int64_t M, int64_t N, int multiprocessors) {
  const auto time = [&](int64_t rows, int64_t columns, double each) {
    const int64_t tiles = ((M + rows - 1) / rows) * ((N + columns - 1) / columns);
    const int64_t units = multiprocessors > 0 ? multiprocessors : 1;
    return static_cast<double>((tiles + units - 1) / units) * each;
  };
  // In units of a perfect 128 x 128 tile: operands of smaller warp tiles cost more shared-memory reads.
  const double large = time(LargeTile::kRows, LargeTile::kColumns, 2.0);
  const double medium = time(MediumTile::kRows, MediumTile::kColumns, 1.1);
  const double small = time(SmallTile::kRows, SmallTile::kColumns, 0.4);
  if (small < medium && small < large) return LinearTileSize::small;
  return medium < large ? LinearTileSize::medium : LinearTileSize::large;
}

}  // namespace peftkern::cuda
