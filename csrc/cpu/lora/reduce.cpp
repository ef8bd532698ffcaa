// The reductions of the low-rank branch, in one pass over an activation (x or dy):
//
//   dot    out[i, r] = alpha_dot   * sum_c drop(in)[i, c] * p[r, c]     over columns: u, dv
//   outer  g[r, c]   = alpha_outer * sum_i v[i, r] * drop(in)[i, c]     over rows: gradients of A and B
//   colsum s[c]      = sum_i in[i, c]                                   over rows: gradient of the bias
//
// Each is optional. Rows are split into segments that depend on (M, C, R) alone, each with its own sums,
// which are added up in order: the bits do not depend on the number of threads. A row's dot depends on (C, R)
// alone.
#include "cpu/common/segments.h"
#include "cpu/common/thread.h"
#include "cpu/common/tile.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

// Rows that pass a tile's columns of p while those lie in cache.
constexpr int64_t kBlockRows = 192;

void scale_rows(float* out, int64_t ld, int64_t rows, int64_t cols, float alpha) {
  if (alpha == 1.0f) return;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t r = 0; r < cols; ++r) out[i * ld + r] *= alpha;
  }
}

void zero_rows(float* out, int64_t ld, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) std::memset(out + i * ld, 0, sizeof(float) * cols);
}

// Rows [i0, i1), columns [c0, c1); `sums` holds R (+ 1) rows of these columns for this segment, ld apart. A
// tile's columns of p and of the sums stay in cache while all rows pass. What follows is asked for in time:
// rows before `end`, then the next columns.
void reduce_block(const LoraReduceTask& a, int64_t i0, int64_t i1, int64_t c0, int64_t c1, int64_t end,
                  float* sums, int64_t ld) {
  Tile tile;
  float* colsum = a.colsum != nullptr ? sums + (a.v != nullptr ? a.R * ld : 0) : nullptr;
  float* out = a.p != nullptr ? a.out + i0 * a.ldo : nullptr;
  if (a.v != nullptr) zero_rows(sums, ld, a.R, round_up(c1 - c0, kPad));
  if (colsum != nullptr) zero_rows(colsum, ld, 1, round_up(c1 - c0, kPad));
  if (out != nullptr) zero_rows(out, a.ldo, i1 - i0, a.R);
  for (int64_t c = c0; c < c1; c += kTileCols) {
    const int64_t cols = min64(kTileCols, c1 - c), n = round_up(cols, kPad);
    for (int64_t i = i0; i < i1; i += kTileRows) {
      const int64_t rows = min64(kTileRows, i1 - i);
      const bool below = i + kTileRows < end;
      const int64_t next_i = below ? i + kTileRows : i0, next_c = below ? c : c + kTileCols;
      // A row's dropout takes as long as a block of a product; only to widen it takes no time.
      const int64_t blocks =
          (out != nullptr ? dot_blocks(rows, a.R) : 0) + (a.v != nullptr ? outer_blocks(n, a.R) : 0);
      const bool busy = a.dropout.threshold != 0 || blocks == 0;
      Ahead ahead(a.in, next_i, min64(kTileRows, end - next_i), next_c, min64(kTileCols, c1 - next_c),
                  blocks + (busy ? rows : 0));
      const auto ask = [&ahead] { ahead.ask(); };
      if (busy)
        widen_tile(a.in, i, rows, c, cols, a.dropout, tile.data, nullptr, ask);
      else
        widen_tile(a.in, i, rows, c, cols, a.dropout, tile.data);
      if (out != nullptr)
        dot(tile.data, kTileLd, rows, a.p + c, a.ldp, n, a.R, out + (i - i0) * a.ldo, a.ldo,
            static_cast<const float*>(nullptr), ask);
      if (a.v != nullptr)
        outer(tile.data, kTileLd, rows, a.v + i * a.ldv, a.ldv, a.R, n, sums + (c - c0), ld, ask);
      if (colsum != nullptr) add_columns(tile.data, rows, n, colsum + (c - c0));
    }
  }
  if (out != nullptr) scale_rows(out, a.ldo, i1 - i0, a.R, a.alpha_dot);
}

// out[c] = alpha * (sums of all segments, in order)[c]
void add_segments(const float* sums, int64_t stride, int64_t segments, int64_t n, float alpha, float* out) {
  for (int64_t c = 0; c < n; c += W) {
    vf acc = load(sums + c);
    for (int64_t s = 1; s < segments; ++s) acc += load(sums + s * stride + c);
    acc *= alpha;
    if (c + W <= n) {
      store(out + c, acc);
    } else {
      store_n(out + c, acc, static_cast<int>(n - c));
    }
  }
}

// Sums alone, of columns [c0, c1), whose sums stay in the thread's cache: one segment after the other is
// added to the first's.
void reduce_columns(const LoraReduceTask& a, int64_t c0, int64_t c1, float* room) {
  static_assert(kSumLd >= kTileCols);
  constexpr int64_t ld = kSumLd;
  const int64_t rows = (a.M + a.segments - 1) / a.segments, n = c1 - c0, lines = a.segment_floats / a.ld;
  float* next = room + lines * ld;
  for (int64_t s = 0; s < a.segments; ++s) {
    reduce_block(a, min64(a.M, s * rows), min64(a.M, (s + 1) * rows), c0, c1, a.M, s == 0 ? room : next, ld);
    for (int64_t r = 0; s > 0 && r < lines; ++r)
      for (int64_t c = r * ld; c < r * ld + n; c += W) store(room + c, load(room + c) + load(next + c));
  }
  const int64_t ranks = a.v != nullptr ? a.R : 0;
  for (int64_t r = 0; r < ranks; ++r)
    add_segments(room + r * ld, 0, 1, n, a.alpha_outer, a.g + r * a.ldg + c0);
  if (a.colsum != nullptr) add_segments(room + ranks * ld, 0, 1, n, 1.0f, a.colsum + c0);
}

}  // namespace

void lora_reduce_run(const LoraReduceTask& a) {
  const bool over_rows = a.v != nullptr || a.colsum != nullptr;
  const int64_t stride = a.segment_floats;
  if (!over_rows) {
    // Only dot: blocks of rows are independent, as many for every thread.
    const int64_t parts = round_up((a.M + kBlockRows - 1) / kBlockRows, a.threads);
    const int64_t block = parts > 0 ? round_up((a.M + parts - 1) / parts, kDotRows) : 0;
    const int64_t blocks = block > 0 ? (a.M + block - 1) / block : 0;
    parallel(a.threads, [&] {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < blocks; ++b) {
        reduce_block(a, b * block, min64(a.M, (b + 1) * block), 0, a.C, min64(a.M, (b + 1) * block), nullptr,
                     0);
      }
    });
    return;
  }
  // Sums of many rows are what goes through memory: more than the rows of a tile. Then threads share columns
  // alone, if there are some for each.
  const int64_t shares = round_up((a.C + kTileCols - 1) / kTileCols, a.threads);
  const int64_t share = round_up((a.C + shares - 1) / shares, kOuterVectors * W);
  if (a.p == nullptr && a.v != nullptr && a.R >= kTileRows && (a.threads - 1) * share < a.C) {
    parallel(a.threads, [&] {
      float* room = a.scratch + thread_number() * 2 * (a.segment_floats / a.ld) * kSumLd;
#pragma omp for schedule(static)
      for (int64_t c = 0; c < a.C; c += share) reduce_columns(a, c, min64(a.C, c + share), room);
    });
    return;
  }
  // dot needs whole rows; without it, columns are split too.
  const int64_t panel = a.p != nullptr ? round_up(a.C, kTileCols) : kTileCols;
  const int64_t panels = panel > 0 ? (a.C + panel - 1) / panel : 0;
  const int64_t rows = (a.M + a.segments - 1) / a.segments;
  parallel(a.threads, [&] {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.segments * panels; ++t) {
      const int64_t s = t / panels, c0 = t % panels * panel;
      const int64_t i1 = min64(a.M, (s + 1) * rows);
      reduce_block(a, min64(a.M, s * rows), i1, c0, min64(a.C, c0 + panel), i1, a.scratch + s * stride + c0,
                   a.ld);
    }
    if (a.v != nullptr) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < a.R; ++r) {
        add_segments(a.scratch + r * a.ld, stride, a.segments, a.C, a.alpha_outer, a.g + r * a.ldg);
      }
    }
    if (a.colsum != nullptr) {
#pragma omp single nowait
      add_segments(a.scratch + (a.v != nullptr ? a.R * a.ld : 0), stride, a.segments, a.C, 1.0f, a.colsum);
    }
  });
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
