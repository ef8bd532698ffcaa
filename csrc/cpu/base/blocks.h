// How a base product is cut up: blocks of the output for the threads, blocks of the inner dimension, packed
// operands, tiles in registers. What a packed element is, and how a tile is computed, is the Format's.
//
// A Format has 4-byte packed elements `Element` that stand for kTerms terms of the inner dimension each;
// kTileRows x kTileCols of the output per tile; tiles[r - 1], which computes a tile of r rows; and complete,
// which a tile goes through after its last block. Rows of a are packed as pack.h says, kBaseRow elements
// apart; tiles of W come packed from its loader B, see operand/dense.h.
#pragma once

#include <atomic>

#include "cpu/base/pack.h"
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

// A product, and how its threads share it. For one block of the inner dimension after the other, all of them
// pack a, rows of which stay in L2; then each takes units of the output: the rows of a group, the columns of
// a tile. It packs the tile of B into L1 and uses it up at once. Who computes a unit does not change its
// bits.
template <class F, class B>
class Blocks {
  using Element = typename F::Element;
  static_assert(sizeof(Element) == sizeof(float), "scratch is counted in floats");
  static constexpr int64_t kTerms = kBaseChain * F::kTerms;
  // Rows of a between what is packed and what is asked for.
  static constexpr int64_t kAhead = 4;

 public:
  explicit Blocks(const BaseArgs& args) : g_(args), w_(args) {
    const int64_t row_tiles = ceil_div(g_.rows, F::kTileRows), across = ceil_div(g_.cols, kTileCols);
    tile_rows_ = ceil_div(g_.rows, row_tiles);
    // B is packed once per group: more than one only if there are few columns for many threads.
    const int64_t units = g_.threads > 1 ? 4 * g_.threads : 1;
    group_rows_ = ceil_div(row_tiles, smaller(ceil_div(units, across), row_tiles)) * tile_rows_;
    groups_ = ceil_div(g_.rows, group_rows_);
    units_ = groups_ * across;
  }

  // By each thread of a parallel region.
  void run() {
    auto* scratch = reinterpret_cast<Element*>(g_.scratch);
    const int64_t room = g_.rows * kBaseRow;
    Element* packed_b = scratch + 2 * room + thread_number() * kBaseChain * kTileCols;
    // A unit is taken before the one before it is computed, so that B can be asked for in time; the last one
    // taken belongs to the next block. Whoever is done with a block goes on to pack the next, in other room.
    int64_t unit = next_++;
    for (int64_t k = 0, end = units_; k < g_.inner; k += kTerms, end += units_) {
      Element* packed_a = scratch + k / kTerms % 2 * room;
      pack_rows(k, packed_a);
      while (unit < end) {
        const int64_t next = next_++;
        multiply(at(unit), at(next), packed_a, packed_b);
        unit = next;
      }
    }
  }

 private:
  struct Unit {
    int64_t k, row, col;
    int terms, cols;
  };
  Unit at(int64_t unit) const {
    const int64_t k = unit / units_ * kTerms, row = unit % groups_ * group_rows_;
    const int64_t col = unit % units_ / groups_ * kTileCols;
    return {k, row, col, static_cast<int>(smaller(kTerms, g_.inner - k)),
            static_cast<int>(smaller(kTileCols, g_.cols - col))};
  }

  void pack_rows(int64_t k, Element* packed_a) const {
    const auto* a = static_cast<const typename B::Activation*>(g_.a) + k * g_.a_col;
    const int terms = static_cast<int>(smaller(kTerms, g_.inner - k));
#pragma omp for schedule(dynamic, 16)
    for (int64_t i = 0; i < g_.rows; ++i) {
      const auto* row = a + i * g_.a_row;
      if (g_.a_col == 1) ask_for_bytes(row + kAhead * g_.a_row, terms * static_cast<int64_t>(sizeof(*row)));
      pack_row(row, g_.a_col, terms, g_.scale ? g_.scale + k : nullptr, packed_a + i * kBaseRow);
    }
  }

  void multiply(const Unit& u, const Unit& next, const Element* packed_a, Element* packed_b) const {
    w_.pack(u.col, u.k, u.cols, u.terms, packed_b);
    const int64_t end = smaller(g_.rows, u.row + group_rows_), parts = ceil_div(end - u.row, tile_rows_);
    const int depth = (u.terms + F::kTerms - 1) / F::kTerms;
    for (int64_t i = u.row, part = 0; i < end; i += tile_rows_, ++part) {
      if (next.terms > 0) w_.ask(next.col, next.k, next.cols, next.terms, part, parts);
      const int rows = static_cast<int>(smaller(tile_rows_, end - i));
      compute<F>(rows, u.cols, depth, packed_a + i * kBaseRow, packed_b, g_.out + i * g_.ld + u.col, g_.ld,
                 u.k == 0 && !g_.add);
      if (u.k + u.terms == g_.inner) F::complete(g_, i, rows, u.col, u.cols);
    }
  }

  static int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

  const BaseArgs& g_;
  const B w_;
  int64_t tile_rows_, group_rows_, groups_, units_;
  std::atomic<int64_t> next_{0};
};

template <class F, class B>
static void run_blocks(const BaseArgs& g) {
  Blocks<F, B> blocks(g);
  parallel(g.threads, [&] { blocks.run(); });
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
