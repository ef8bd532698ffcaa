// The reductions of multi_lora_linear (see peftkern/cpu_multi.h), one pass over an activation:
//
//   dot    dot[i, r]   = alpha * sum_c drop(in)[i, c] * col_scale[c] * p[r, c]   for the rows i of a segment
//   outer  G[r, c]     = alpha * row_scale[r] * sum_i v[i, r] * drop(in)[i, c]
//          grad[r, c]  = col_scale[c] * G[r, c]          col_grad[c] = sum_r p[r, c] * G[r, c]
//   colsum             = sum_i in[i, c]                                over the rows of several segments
//
// A row's dot has the operations of lora_reduce.cpp in their order: it depends on (C, R) alone, not on the
// rows around it. Sums over rows are made in parts of fixed size, added in order, whoever computes them.
#include "cpu/common/thread.h"
#include "cpu/multi/few.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

// What a thread works in; sized by kReduceFloatsPerRank.
struct Room {
  float *panel, *sums, *total, *dots, *v;
  Room(float* scratch, int64_t R)
      : panel(scratch),
        sums(panel + R * kTileLd),
        total(sums + R * kTileLd),
        dots(total + R * kTileLd),
        v(dots + R * kFewRows) {}
};
static_assert(3 * kTileLd + kFewRows + kTileRows <= kReduceFloatsPerRank, "scratch is too small");
static_assert(kDotRows <= kFewRows, "scratch is too small");

template <class T>
void write_gradient(const MultiSegment& s, const float* sums, int64_t c, int64_t cols) {
  T* to = static_cast<T*>(s.grad.data) + c * s.grad.col;
  const float* col_scale = s.col_scale != nullptr ? s.col_scale + c : nullptr;
  const Copy<T, float> copy{sums, to, kTileLd, 1, s.grad.row, s.grad.col, s.alpha, s.row_scale, col_scale};
  copy.block(0, s.R, 0, cols);
}

// col_grad[c ...] = alpha * sum_r row_scale[r] * p[r, c ...] * sums[r]. panel: room for a tile of p.
void write_col_gradient(const MultiSegment& s, const float* sums, int64_t c, int64_t cols, float* panel) {
  const PanelTile<float> p = panel_tile(s, 0, s.R, c, cols, panel);
  for (int64_t k = 0; k < cols; k += W) {
    vf sum = zero();
    for (int64_t r = 0; r < s.R; ++r) {
      const vf g = load(sums + r * kTileLd + k);
      sum = fma(load(p.data + r * p.ld + k), s.row_scale != nullptr ? g * splat(s.row_scale[r]) : g, sum);
    }
    store_n(s.col_grad + c + k, sum * splat(s.alpha), static_cast<int>(min64(W, cols - k)));
  }
}

// What the sums over all rows of columns [c, c + cols) are for.
void write_gradient(const MultiSegment& s, const float* sums, int64_t c, int64_t cols, float* panel) {
  if (s.col_grad != nullptr) write_col_gradient(s, sums, c, cols, panel);
  if (s.grad.data == nullptr) return;
  switch (s.grad.dtype) {
    case DType::f32:
      return write_gradient<float>(s, sums, c, cols);
    case DType::bf16:
      return write_gradient<bf16>(s, sums, c, cols);
    case DType::f16:
      return write_gradient<f16>(s, sums, c, cols);
  }
}

void zero_tile(float* tile, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) std::memset(tile + r * kTileLd, 0, sizeof(float) * n);
}

void add_tile(float* to, const float* from, int64_t ld, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < n; c += W) {
      store(to + r * kTileLd + c, load(to + r * kTileLd + c) + load(from + r * ld + c));
    }
  }
}

// out[m, k] = x[m, k] * scale[k] for k < cols, zeros up to n columns. out may be x.
void scale_rows(const float* x, int64_t ldx, int64_t rows, const float* scale, int64_t cols, int64_t n,
                float* out, int64_t ldo) {
  for (int64_t k = 0; k < n; k += W) {
    const vf factor = load_n(scale + k, static_cast<int>(min64(W, k < cols ? cols - k : 0)));
    for (int64_t m = 0; m < rows; ++m) store(out + m * ldo + k, load(x + m * ldx + k) * factor);
  }
}

// One block of rows' dots over one tile of columns, added to what is in a.dot.
template <class T>
void add_dots(const MultiReduceTask& a, const MultiUnit& u, int64_t i, int64_t rows, const float* x,
              PanelTile<T> p, int64_t n, bool last, float* dots) {
  const int64_t R = u.r1 - u.r0;
  const auto row = [&](int64_t m) { return a.dot + u.segment->rows[i + m] * a.ld + u.r0; };
  for (int64_t m = 0; m < rows; ++m) std::memcpy(dots + m * R, row(m), sizeof(float) * R);
  dot(x, kTileLd, rows, p.data, p.ld, n, R, dots, R);
  for (int64_t m = 0; m < rows; ++m) {
    float* to = row(m);
    const float alpha = last ? u.segment->alpha : 1.0f;
    for (int64_t r = 0; r < R; ++r) to[r] = alpha * dots[m * R + r];
  }
}

// Rows [i0, i1) and columns [c, c + cols): the dots go to a.dot, the sums over the rows to room.sums.
template <class T>
void reduce_tile(const MultiReduceTask& a, const MultiUnit& u, int64_t i0, int64_t i1, int64_t c,
                 PanelTile<T> p, const Room& room) {
  const MultiSegment& s = *u.segment;
  const int64_t cols = min64(kTileCols, u.c1 - c), n = round_up(cols, kPad), R = u.r1 - u.r0;
  Tile tile;
  alignas(64) float scaled[kDotRows * kTileLd];
  float* colsum = nullptr;
  if (u.outer) zero_tile(room.sums, R, n);
  if (u.colsum >= 0) {
    colsum = a.colsums + (u.colsum + (i0 - u.i0) / s.part_rows) * round_up(a.C, kPad) + c;
    std::memset(colsum, 0, sizeof(float) * n);
  }
  for (int64_t i = i0; i < i1; i += kTileRows) {
    const int64_t rows = min64(kTileRows, i1 - i);
    const bool below = i + kTileRows < i1;
    const int64_t next_i = below ? i + kTileRows : i0, next_c = below ? c : c + kTileCols;
    for (int64_t m = 0; m < rows; m += kDotRows) {
      const int64_t take = min64(kDotRows, rows - m);
      float* x = tile.data + m * kTileLd;
      widen_tile(a.in, i + m, take, c, cols, s.dropout, x, s.rows);
      const int64_t ahead = min64(take, i1 - next_i - m);
      if (next_c < u.c1) prefetch(a.in, next_i + m, ahead, next_c, min64(kTileCols, u.c1 - next_c), s.rows);
      if (!u.dot || R == 0) continue;
      // The sums take x as it is.
      if (s.col_scale != nullptr) scale_rows(x, kTileLd, take, s.col_scale + c, cols, n, scaled, kTileLd);
      add_dots(a, u, i + m, take, s.col_scale != nullptr ? scaled : x, p, n, c + cols == u.c1, room.dots);
    }
    if (u.outer) {
      // Neighbours, as the rows of a sequence are, are read where they lie.
      const bool adjacent = s.rows[i + rows - 1] - s.rows[i] == rows - 1;
      for (int64_t m = 0; !adjacent && m < rows; ++m) {
        std::memcpy(room.v + m * R, a.v + s.rows[i + m] * a.ld, sizeof(float) * R);
      }
      outer(tile.data, kTileLd, rows, adjacent ? a.v + s.rows[i] * a.ld : room.v, adjacent ? a.ld : R, R, n,
            room.sums, kTileLd);
    }
    if (colsum != nullptr) add_columns(tile.data, rows, n, colsum);
  }
}

// The dots of at most kFewRows rows. x: room for as many rows of a.C columns.
template <class T>
void few_dots(const MultiReduceTask& a, const MultiUnit& u, const Room& room, float* x) {
  const MultiSegment& s = *u.segment;
  const int64_t R = u.r1 - u.r0, rows = u.i1 - u.i0, ldx = few_row(a.C);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t c = 0; c < a.C; c += kTileCols) {
      const int64_t cols = min64(kTileCols, a.C - c);
      float* to = x + m * ldx + c;
      widen_tile(a.in, u.i0 + m, 1, c, cols, s.dropout, to, s.rows);
      if (s.col_scale != nullptr) scale_rows(to, 0, 1, s.col_scale + c, cols, round_up(cols, kPad), to, 0);
    }
  }
  stream_dots<T>(s, u.r0, u.r1, x, ldx, rows, a.C, room.panel, room.dots);
  for (int64_t m = 0; m < rows; ++m) {
    float* to = a.dot + s.rows[u.i0 + m] * a.ld + u.r0;
    for (int64_t r = 0; r < R; ++r) to[r] = s.alpha * room.dots[m * R + r];
  }
}

void reduce_unit(const MultiReduceTask& a, const MultiUnit& u, float* scratch) {
  const MultiSegment& s = *u.segment;
  const int64_t R = u.r1 - u.r0, Cpad = round_up(a.C, kPad);
  const Room room(scratch, R);
  if (u.dot) {
    const int64_t end = u.r1 == s.R ? a.ld : u.r1;
    for (int64_t i = u.i0; i < u.i1; ++i) {
      std::memset(a.dot + s.rows[i] * a.ld + u.r0, 0, sizeof(float) * (end - u.r0));
    }
  }
  if (R == 0 && u.colsum < 0) return;
  if (u.dot && !u.outer && u.colsum < 0 && s.p.col == 1 && u.i1 - u.i0 <= kFewRows) {
    float* x = scratch + kReduceFloatsPerRank * R;
    switch (s.p.dtype) {
      case DType::f32:
        return few_dots<float>(a, u, room, x);
      case DType::bf16:
        return few_dots<bf16>(a, u, room, x);
      case DType::f16:
        return few_dots<f16>(a, u, room, x);
    }
  }
  // The first part's sums are the total so far.
  Room first = room;
  first.sums = room.total;
  for (int64_t c = u.c0; c < u.c1; c += kTileCols) {
    const int64_t cols = min64(kTileCols, u.c1 - c), n = round_up(cols, kPad);
    const auto tile = [&](auto p) {
      for (int64_t i = u.i0; i < u.i1; i += s.part_rows) {
        reduce_tile(a, u, i, min64(u.i1, i + s.part_rows), c, p, i == u.i0 ? first : room);
        if (u.outer && i > u.i0) add_tile(room.total, room.sums, kTileLd, R, n);
      }
      if (!u.outer) return;
      if (u.sums < 0) return write_gradient(s, room.total, c, cols, room.panel);
      for (int64_t r = 0; r < R; ++r) {
        std::memcpy(a.sums + u.sums + r * Cpad + c, room.total + r * kTileLd, sizeof(float) * n);
      }
    };
    if (u.dot && R > 0) {
      with_panel_tile(s, u.i1 - u.i0 <= kDotRows, u.r0, u.r1, c, cols, room.panel, tile);
    } else {
      tile(PanelTile<float>{});
    }
  }
}

void finish_unit(const MultiReduceTask& a, const MultiUnit& u, float* scratch) {
  const MultiSegment& s = *u.segment;
  const int64_t Cpad = round_up(a.C, kPad);
  const float* sums = a.sums + u.sums;
  const Room room(scratch, s.R);
  float* total = room.total;
  for (int64_t c = u.c0; c < u.c1; c += kTileCols) {
    const int64_t cols = min64(kTileCols, u.c1 - c), n = round_up(cols, kPad);
    for (int64_t r = 0; r < s.R; ++r) {
      std::memcpy(total + r * kTileLd, sums + r * Cpad + c, sizeof(float) * n);
    }
    for (int64_t part = u.i0 + 1; part < u.i1; ++part) {
      add_tile(total, sums + part * s.R * Cpad + c, Cpad, s.R, n);
    }
    write_gradient(s, total, c, cols, room.panel);
  }
}

void add_colsums(const MultiReduceTask& a) {
  for (int64_t c = 0; c < a.C; c += W) {
    const int n = static_cast<int>(min64(W, a.C - c));
    vf sum = load_n(a.colsum + c, n);
    for (int64_t k = 0; k < a.colsum_count; ++k) sum += load(a.colsums + k * round_up(a.C, kPad) + c);
    store_n(a.colsum + c, sum, n);
  }
}

}  // namespace

void multi_reduce_run(const MultiReduceTask& a) {
  parallel(a.threads, [&] {
    float* scratch = a.scratch + thread_number() * a.scratch_floats;
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < a.count; ++t) reduce_unit(a, a.units[t], scratch);
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < a.finish_count; ++t) finish_unit(a, a.finish[t], scratch);
    if (a.colsum != nullptr) {
#pragma omp single nowait
      add_colsums(a);
    }
  });
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
