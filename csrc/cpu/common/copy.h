// A block of out[r, c] = alpha * row_scale[r] * col_scale[c] * in[r, c], between any strides and dtypes.
//
// Rows are copied by vectors, transpositions by squares in registers; anything else goes by element.
#pragma once

#include <algorithm>

#include "cpu/common/tile.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

PEFTKERN_INLINE void put(float* p, float x) {
  *p = x;
}
PEFTKERN_INLINE void put(bf16* p, float x) {
  store_n(p, splat(x), 1);
}
PEFTKERN_INLINE void put(f16* p, float x) {
  store_n(p, splat(x), 1);
}

// Bytes between what is transposed and what is asked for: the hardware's own guesses start anew in every
// page.
constexpr int64_t kCopyAhead = 8192;

// The task for one element type each way. `swapped` exchanges rows and columns of everything.
template <class TO, class TI>
struct Copy {
  const TI* in;
  TO* out;
  int64_t in_row, in_col, out_row, out_col;
  float alpha;
  const float *row_scale, *col_scale;

  Copy swapped() const { return {in, out, in_col, in_row, out_col, out_row, alpha, col_scale, row_scale}; }
  float row_factor(int64_t r) const { return row_scale != nullptr ? alpha * row_scale[r] : alpha; }

  void element(int64_t r, int64_t c) const {
    const float x = row_factor(r) * widen_scalar(in[r * in_row + c * in_col]);
    put(out + r * out_row + c * out_col, col_scale != nullptr ? x * col_scale[c] : x);
  }

  void elements(int64_t r0, int64_t r1, int64_t c0, int64_t c1) const {
    for (int64_t r = r0; r < r1; ++r) {
      for (int64_t c = c0; c < c1; ++c) element(r, c);
    }
  }

  // Both contiguous along columns.
  void rows(int64_t r0, int64_t r1, int64_t c0, int64_t c1) const {
    for (int64_t r = r0; r < r1; ++r) {
      const vf factor = splat(row_factor(r));
      const TI* from = in + r * in_row;
      TO* to = out + r * out_row;
      int64_t c = c0;
      for (; c + W <= c1; c += W) {
        const vf x = factor * load(from + c);
        store(to + c, col_scale != nullptr ? x * load(col_scale + c) : x);
      }
      if (c < c1) {
        const int n = static_cast<int>(c1 - c);
        const vf x = factor * load_n(from + c, n);
        store_n(to + c, col_scale != nullptr ? x * load_n(col_scale + c, n) : x, n);
      }
    }
  }

  // The square from (r, c) on, W x W unless it is less; in contiguous along rows, out along columns. Asks for
  // what lies `ahead` elements further on.
  template <bool WHOLE>
  PEFTKERN_INLINE void square(const Copy& a, int64_t r, int rows, int64_t c, int cols, int64_t ahead) {
    const vf factor =
        a.row_scale == nullptr ? splat(a.alpha) : splat(a.alpha) * load_n(a.row_scale + r, rows);
    const TI* from = a.in + r + c * a.in_col;
    vf t[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      const TI* p = from + i * a.in_col;
      if (WHOLE) __builtin_prefetch(p + ahead);
      t[i] = WHOLE ? load(p) * factor : i < cols ? load_n(p, rows) * factor : zero();
      if (a.col_scale != nullptr && (WHOLE || i < cols)) t[i] *= a.col_scale[c + i];
    }
    transpose(t);
    TO* to = a.out + r * a.out_row + c;
#pragma GCC unroll 16
    for (int k = 0; k < W; ++k) {
      if (WHOLE)
        store(to + k * a.out_row, t[k]);
      else if (k < rows)
        store_n(to + k * a.out_row, t[k], cols);
    }
  }

  void transposed(int64_t r0, int64_t r1, int64_t c0, int64_t c1) const {
    const int64_t step = std::max<int64_t>(W * in_col, 1);
    const int64_t ahead = std::max<int64_t>(kCopyAhead / static_cast<int64_t>(sizeof(TI)) / step, 1) * step;
    for (int64_t c = c0; c < c1; c += W) {
      for (int64_t r = r0; r < r1; r += W) {
        const int rows = static_cast<int>(min64(W, r1 - r)), cols = static_cast<int>(min64(W, c1 - c));
        if (rows == W && cols == W)
          square<true>(*this, r, W, c, W, ahead);
        else
          square<false>(*this, r, rows, c, cols, ahead);
      }
    }
  }

  void block(int64_t r0, int64_t r1, int64_t c0, int64_t c1) const {
    if (in_col == 1 && out_col == 1) {
      rows(r0, r1, c0, c1);
    } else if (in_row == 1 && out_col == 1) {
      transposed(r0, r1, c0, c1);
    } else if (in_col == 1 && out_row == 1) {
      swapped().transposed(c0, c1, r0, r1);
    } else {
      elements(r0, r1, c0, c1);
    }
  }
};

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
