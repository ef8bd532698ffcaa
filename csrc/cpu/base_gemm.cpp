// The base product in fp32 from fp32, bf16 or fp16 operands: out = (a * scale) B, blocked over the inner
// dimension. Per block, both operands are packed as fp32 (base_pack.h), then tiles of kTileRows x kTileCols
// are accumulated in registers and added to out.
//
// An element's sum is a chain of fused multiply-adds over at most kBaseChain terms, the chains added in
// order. It depends on the inner dimension alone, so a row has the same bits in any batch, with any number of
// threads.
#include "cpu/base_pack.h"
#include "cpu/thread.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

// 14 x 2 accumulators fill the 32 registers of AVX-512, 6 x 2 the 16 of the other levels.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif
// Room of a packed row of a. Not a multiple of 4 KB, or a tile's rows would share one set of the L1 cache;
// a constant, or a tile's row addresses would not fit the registers.
constexpr int kRow = kBaseRow;
static_assert(kTileCols <= kBaseTileCols, "scratch is sized for the widest level");

template <int ROWS>
void tile(int depth, const float* a, const float* b, float* out, int64_t ld, bool first) {
  for (int i = 0; i < ROWS; ++i) {
    __builtin_prefetch(out + i * ld, 1);
    __builtin_prefetch(out + i * ld + W, 1);
  }
  for (; depth > 0; depth -= kBaseChain, first = false) {
    vf acc[ROWS][2];
#pragma GCC unroll 14
    for (int i = 0; i < ROWS; ++i) acc[i][0] = acc[i][1] = zero();
    const float* end = a + smaller(depth, kBaseChain);
    for (; a < end; ++a, b += kTileCols) {
      const vf b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 14
      for (int i = 0; i < ROWS; ++i) {
        const vf x = splat(a[i * kRow]);
        acc[i][0] = fma(x, b0, acc[i][0]);
        acc[i][1] = fma(x, b1, acc[i][1]);
      }
    }
#pragma GCC unroll 14
    for (int i = 0; i < ROWS; ++i) {
      float* o = out + i * ld;
      store(o, first ? acc[i][0] : load(o) + acc[i][0]);
      store(o + W, first ? acc[i][1] : load(o + W) + acc[i][1]);
    }
  }
}

using TileFunction = void (*)(int, const float*, const float*, float*, int64_t, bool);

#if defined(__AVX512F__)
constexpr TileFunction kTiles[] = {tile<1>, tile<2>, tile<3>,  tile<4>,  tile<5>,  tile<6>,  tile<7>,
                                   tile<8>, tile<9>, tile<10>, tile<11>, tile<12>, tile<13>, tile<14>};
#else
constexpr TileFunction kTiles[] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
#endif

// One tile of out, of `cols` columns.
void compute(int rows, int cols, int depth, const float* a, const float* b, float* out, int64_t ld,
             bool first) {
  if (cols == kTileCols) {
    kTiles[rows - 1](depth, a, b, out, ld, first);
    return;
  }
  alignas(64) float edge[kTileRows * kTileCols];
  if (!first)
    for (int i = 0; i < rows; ++i)
      for (int c = 0; c < cols; ++c) edge[i * kTileCols + c] = out[i * ld + c];
  kTiles[rows - 1](depth, a, b, edge, kTileCols, first);
  for (int i = 0; i < rows; ++i)
    for (int c = 0; c < cols; ++c) out[i * ld + c] = edge[i * kTileCols + c];
}

// out[row0 .. +rows, col0 .. +cols], by one thread: nothing is shared, so there is nothing to wait for.
template <class T>
void block(const BaseArgs& g, int64_t row0, int64_t rows, int64_t col0, int64_t cols, float* packed_a) {
  const T* a = static_cast<const T*>(g.a) + row0 * g.a_row;
  const T* w = static_cast<const T*>(g.w) + col0 * g.w_out;
  float* packed_b = packed_a + rows * kRow;
  float* out = g.out + row0 * g.ld + col0;
  // Rows spread evenly over the tiles; tiles in groups, so that a packed tile of B (L1) meets several of a
  // (L2).
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t tile_rows = (rows + row_tiles - 1) / row_tiles;
  const int64_t group_rows = 8 * tile_rows;
  for (int64_t k0 = 0; k0 < g.inner; k0 += kBaseBlock) {
    const int depth = static_cast<int>(smaller(kBaseBlock, g.inner - k0));
    for (int64_t i = 0; i < rows; ++i)
      pack_row(a + i * g.a_row + k0 * g.a_col, g.a_col, depth, g.scale ? g.scale + k0 : nullptr,
               packed_a + i * kRow);
    for (int64_t j = 0; j < cols; j += kTileCols)
      pack_tile(w + j * g.w_out + k0 * g.w_in, g.w_out, g.w_in,
                static_cast<int>(smaller(kTileCols, cols - j)), depth, packed_b + j * kBaseBlock);
    for (int64_t group = 0; group < rows; group += group_rows)
      for (int64_t j = 0; j < cols; j += kTileCols)
        for (int64_t i = group; i < smaller(rows, group + group_rows); i += tile_rows)
          compute(static_cast<int>(smaller(tile_rows, rows - i)),
                  static_cast<int>(smaller(kTileCols, cols - j)), depth, packed_a + i * kRow,
                  packed_b + j * kBaseBlock, out + i * g.ld + j, g.ld, k0 == 0);
  }
}

template <class T>
void run(const BaseArgs& g) {
  const int64_t down = (g.rows + g.block_rows - 1) / g.block_rows;
  const int64_t across = (g.cols + g.block_cols - 1) / g.block_cols;
  const int64_t room = base_gemm_scratch(g.block_rows, g.block_cols);
  // Who computes a block does not change its bits.
#pragma omp parallel for schedule(dynamic) num_threads(g.threads)
  for (int64_t b = 0; b < down * across; ++b) {
    const int64_t row = b % down * g.block_rows, col = b / down * g.block_cols;
    block<T>(g, row, smaller(g.block_rows, g.rows - row), col, smaller(g.block_cols, g.cols - col),
             g.scratch + thread_number() * room);
  }
}

}  // namespace

void base_gemm(const BaseArgs& args) {
  switch (args.dtype) {
    case DType::f32:
      return run<float>(args);
    case DType::bf16:
      return run<bf16>(args);
    case DType::f16:
      return run<f16>(args);
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
