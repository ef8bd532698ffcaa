// out[c] = sum_i a[i, c] * b[i, c], in a fixed order: gradients of the vectors.
#include "cpu/common/segments.h"
#include "cpu/common/thread.h"
#include "cpu/common/tile.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

void column_dot_run(const ColumnDotTask& a) {
  const int64_t Cpad = round_up(a.C, kPad);
  const int64_t panels = (a.C + kTileCols - 1) / kTileCols;
  const int64_t rows = (a.M + a.segments - 1) / a.segments;
  parallel(a.threads, [&] {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.segments * panels; ++t) {
      const int64_t s = t / panels, c0 = t % panels * kTileCols, cols = min64(kTileCols, a.C - c0);
      const int64_t i1 = min64(a.M, (s + 1) * rows), n = round_up(cols, kPad);
      float* sums = a.scratch + s * Cpad + c0;
      Tile left, right;
      std::memset(sums, 0, sizeof(float) * n);
      for (int64_t i = min64(a.M, s * rows); i < i1; i += kTileRows) {
        const int64_t tile = min64(kTileRows, i1 - i);
        widen_tile(a.a, i, tile, c0, cols, Dropout{}, left.data, a.rows);
        if (a.b.data == nullptr) {
          add_columns(left.data, tile, n, sums);
          continue;
        }
        widen_tile(a.b, i, tile, c0, cols, Dropout{}, right.data, a.rows);
        for (int64_t c = 0; c < n; c += W) {
          vf acc = zero();
          for (int64_t m = 0; m < tile; ++m) {
            acc = fma(load(left.data + m * kTileLd + c), load(right.data + m * kTileLd + c), acc);
          }
          store(sums + c, load(sums + c) + acc);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < a.C; ++c) {
      float sum = a.scratch[c];
      for (int64_t s = 1; s < a.segments; ++s) sum += a.scratch[s * Cpad + c];
      a.out[c] = a.accumulate ? a.out[c] + sum : sum;
    }
  });
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
