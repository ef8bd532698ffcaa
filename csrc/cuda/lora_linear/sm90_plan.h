// What all warpgroups of a block agree on: its shared memory, the ring of stages, the order of tiles and how
// many stages each tile takes.
#pragma once

#include "cuda/instructions/cluster.h"
#include "cuda/instructions/launch.h"
#include "cuda/instructions/mbarrier.h"
#include "cuda/instructions/warp.h"
#include "peftkern/cuda.h"

namespace peftkern::cuda::hopper {

constexpr int kRows = 128;                  // of a tile: 64 for each of the two warpgroups that multiply
constexpr int kDepth = 64;                  // of a stage along K: 128 bytes, one row of a swizzled tile
constexpr int kRankGroup = 16;              // ranks of one product
constexpr int kRankDepth = 2 * kRankGroup;  // in a stage of the low-rank term, two terms of each
constexpr int64_t kMaxSize = 0x7fff0000;    // of M, N, K: with a few tiles more still an int
constexpr int kMaxRank = 256;
constexpr int kMaxMadeRank = 32;  // where v is made as well
// Warpgroups: one whose first warp loads and whose other three make the adapter's part, two that multiply.
constexpr int kThreads = 384, kAdapterThreads = 96;
constexpr uint32_t kShrinkBytes = 28 * 1024;  // of shared memory, to make v
constexpr int kAdapterBarrier = 1;            // and one for each multiplying warpgroup
constexpr int kRowBlock = 48;                 // rows of v made at a time, 16 by a warp
constexpr int kRowTileGroup = 16;             // row tiles walked together, so that their operands stay in L2

// Blocks that work on tiles below each other at the same time and share what they load of w: each loads half
// of it, for both. Wide tiles alone: narrow ones are for small problems, down to a single row of tiles.
template <int Columns>
constexpr int kCluster = Columns == 256 ? 2 : 1;

// A ring of stages between those that fill and those that multiply. Everyone counts for himself; one who
// skips stages has no use for the parity.
template <int Stages>
struct Ring {
  uint32_t slot = 0, parity = 0;

  PEFTKERN_DEVICE void advance() {
    if (++slot == Stages) {
      slot = 0;
      parity ^= 1;
    }
  }
  // After some stages that belong to others.
  PEFTKERN_DEVICE void skip(int stages) { slot = (slot + static_cast<uint32_t>(stages)) % Stages; }
};

// Shared memory of a block with tiles of `Columns` columns; MakesV: it makes v too.
template <int Columns, bool MakesV>
struct Layout {
  static constexpr int kStages = Columns == 256 ? 4 : 6;
  static constexpr uint32_t kLeft = kRows * kDepth * 2, kRight = Columns * kDepth * 2;
  static constexpr uint32_t kStage = kLeft + kRight;
  // Dropout bits of a tile, or a tile of lora_A.
  static constexpr uint32_t kExtra = MakesV ? kShrinkBytes : kRows * Columns / 8;
  // g_b and bias of a tile's columns, for each multiplying warpgroup.
  static constexpr uint32_t kVectors = 2 * 2 * Columns * 4;

  static constexpr uint32_t kExtraAt = kStages * kStage, kVectorsAt = kExtraAt + kExtra;
  static constexpr uint32_t kBarriersAt = kVectorsAt + kVectors;
  static constexpr uint32_t kTicketAt = kBarriersAt + 8 * (3 * kStages + 1);
  static constexpr uint32_t kBytes = 1024 + kTicketAt + 8;
  static_assert(kBytes <= most_shared(90));

  unsigned char* memory;  // aligned to 1024 bytes, as swizzled tiles want it
  uint32_t address;

  PEFTKERN_DEVICE explicit Layout(unsigned char* shared) {
    const uint32_t up = (1024 - shared_address(shared) % 1024) % 1024;
    memory = shared + up;
    address = shared_address(memory);
  }
  PEFTKERN_DEVICE uint32_t left(uint32_t slot) const { return address + slot * kStage; }
  PEFTKERN_DEVICE uint32_t right(uint32_t slot) const { return left(slot) + kLeft; }
  PEFTKERN_DEVICE uint32_t full(uint32_t slot) const { return address + kBarriersAt + 8 * slot; }
  PEFTKERN_DEVICE uint32_t empty(uint32_t slot) const { return full(slot) + 8 * kStages; }
  // A stage of the low-rank term is free.
  PEFTKERN_DEVICE uint32_t granted(uint32_t slot) const { return empty(slot) + 8 * kStages; }
  // The dropout bits have been read.
  PEFTKERN_DEVICE uint32_t mask_read() const { return granted(0) + 8 * kStages; }
};

struct Tile {
  int row, column;  // of its first element
};

// Tiles and their stages, for the blocks of a cluster together: it takes tiles number `first`, + `step`, ...,
// and each block its own row of them, which may lie below the matrix.
template <int Columns, bool MakesV>
struct Walk {
  int row_tiles, column_tiles, tiles, first, step, rank;
  int steps;       // stages of the base product
  int rank_steps;  // stages of the low-rank term
  bool rank_tail;  // the last of them is half full
  // Dropout of the low-rank term: it comes first, is masked in place, and the base accumulates on top.
  bool rank_first;

  PEFTKERN_DEVICE explicit Walk(const LoraLinearArgs& args) {
    constexpr int kTogether = kCluster<Columns>;
    row_tiles = static_cast<int>((args.M + kTogether * kRows - 1) / (kTogether * kRows));
    column_tiles = static_cast<int>((args.N + Columns - 1) / Columns);
    tiles = row_tiles * column_tiles;
    first = static_cast<int>(blockIdx.x) / kTogether;
    step = static_cast<int>(gridDim.x) / kTogether;
    rank = static_cast<int>(blockIdx.x) % kTogether;
    steps = static_cast<int>((args.K + kDepth - 1) / kDepth);
    rank_steps = static_cast<int>((args.R + kRankDepth - 1) / kRankDepth);
    rank_tail = rank_steps > 0 && (args.R - 1) % kRankDepth < kRankGroup;
    rank_first = !MakesV && rank_steps > 0 && args.dropout.seed != nullptr;
  }
  PEFTKERN_DEVICE Tile at(int tile) const {
    constexpr int kTogether = kCluster<Columns>, kGroup = kRowTileGroup / kTogether;
    const int group = tile / (kGroup * column_tiles), above = group * kGroup, left = row_tiles - above;
    const int rows = left < kGroup ? left : kGroup, within = tile - above * column_tiles;
    return {((above + within % rows) * kTogether + rank) * kRows, within / rows * Columns};
  }
};

// The number of a lane of a whole warp, as if it were known from here on only: what follows from it is then
// not computed once and kept in registers for ever.
PEFTKERN_DEVICE int known_here(int t) {
  return shuffle(t, t % 32);
}

// lora_B enters as one bf16 term if that is exact.
PEFTKERN_DEVICE bool one_term(const LoraLinearArgs& args) {
  return args.b.dtype == DType::bf16 && args.scales.g_d == nullptr;
}

}  // namespace peftkern::cuda::hopper
