// How a base product is cut up: blocks of the output for the threads, blocks of the inner dimension, packed
// operands, tiles in registers. What a packed element is, and how a tile is computed, is the Format's.
//
// A Format has 4-byte packed elements `Element` that stand for kTerms terms of the inner dimension each;
// kTileRows x kTileCols of the output per tile; kRowsInL2, how many packed rows of a leave room there; kRow
// elements of room for a packed row of a; pack_row as in pack.h; and tiles[r - 1], which computes a tile of
// r rows. Tiles of W come packed from its loader B, see operand/dense.h.
#pragma once

#include "cpu/common/thread.h"
#include "cpu/operand/tile.h"
#include "peftkern/cpu.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// (packed elements per row, a, b, out, ld, whether out is overwritten rather than added to)
template <class Element>
using TileFunction = void (*)(int, const Element*, const Element*, float*, int64_t, bool);

// One tile of out, of `cols` columns.
template <class F>
static void compute(int rows, int cols, int depth, const typename F::Element* a, const typename F::Element* b,
                    float* out, int64_t ld, bool first) {
  if (cols == kTileCols) {
    F::tiles[rows - 1](depth, a, b, out, ld, first);
    return;
  }
  alignas(64) float edge[F::kTileRows * kTileCols];
  if (!first)
    for (int i = 0; i < rows; ++i)
      for (int c = 0; c < cols; ++c) edge[i * kTileCols + c] = out[i * ld + c];
  F::tiles[rows - 1](depth, a, b, edge, kTileCols, first);
  for (int i = 0; i < rows; ++i)
    for (int c = 0; c < cols; ++c) out[i * ld + c] = edge[i * kTileCols + c];
}

// out[row0 .. +rows, col0 .. +cols], by one thread: nothing is shared, so there is nothing to wait for.
template <class F, class B>
static void block(const BaseArgs& g, const B& w, int64_t row0, int64_t rows, int64_t col0, int64_t cols,
                  float* scratch) {
  using Element = typename F::Element;
  static_assert(sizeof(Element) == sizeof(float) && F::kRow <= kBaseRow, "scratch is counted in floats");
  const auto* a = static_cast<const typename B::Activation*>(g.a) + row0 * g.a_row;
  Element* packed_a = reinterpret_cast<Element*>(scratch);
  Element* packed_b = packed_a + rows * F::kRow;
  float* out = g.out + row0 * g.ld + col0;
  constexpr int64_t kColumn = kBaseBlock / F::kTerms;  // packed elements of a column of B
  // Rows spread evenly over the tiles. While all rows of a stay in L2, a tile of B is packed (into L1) and
  // used up at once; otherwise the rows go in groups, so that a packed tile meets several tiles of a.
  const int64_t row_tiles = (rows + F::kTileRows - 1) / F::kTileRows;
  const int64_t tile_rows = (rows + row_tiles - 1) / row_tiles;
  const bool few = rows <= F::kRowsInL2;
  const int64_t span = few ? kTileCols : cols, group_rows = few ? rows : 8 * tile_rows;
  for (int64_t k0 = 0; k0 < g.inner; k0 += kBaseBlock) {
    const int terms = static_cast<int>(smaller(kBaseBlock, g.inner - k0));
    const int depth = (terms + F::kTerms - 1) / F::kTerms;
    for (int64_t i = 0; i < rows; ++i)
      F::pack_row(a + i * g.a_row + k0 * g.a_col, g.a_col, terms, g.scale ? g.scale + k0 : nullptr,
                  packed_a + i * F::kRow);
    for (int64_t j0 = 0; j0 < cols; j0 += span) {
      const int64_t j1 = smaller(cols, j0 + span);
      for (int64_t j = j0; j < j1; j += kTileCols)
        w.pack(col0 + j, k0, static_cast<int>(smaller(kTileCols, cols - j)), terms,
               packed_b + (j - j0) * kColumn);
      for (int64_t group = 0; group < rows; group += group_rows)
        for (int64_t j = j0; j < j1; j += kTileCols)
          for (int64_t i = group; i < smaller(rows, group + group_rows); i += tile_rows)
            compute<F>(static_cast<int>(smaller(tile_rows, rows - i)),
                       static_cast<int>(smaller(kTileCols, cols - j)), depth, packed_a + i * F::kRow,
                       packed_b + (j - j0) * kColumn, out + i * g.ld + j, g.ld, k0 == 0);
    }
  }
}

template <class F, class B>
static void run_blocks(const BaseArgs& g) {
  const B w(g);
  const int64_t down = (g.rows + g.block_rows - 1) / g.block_rows;
  const int64_t across = (g.cols + g.block_cols - 1) / g.block_cols;
  const int64_t room = base_gemm_scratch(g.block_rows, g.block_cols);
  // Who computes a block does not change its bits.
  parallel(g.threads, [&] {
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < down * across; ++b) {
      const int64_t row = b % down * g.block_rows, col = b / down * g.block_cols;
      block<F>(g, w, row, smaller(g.block_rows, g.rows - row), col, smaller(g.block_cols, g.cols - col),
               g.scratch + thread_number() * room);
    }
  });
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
