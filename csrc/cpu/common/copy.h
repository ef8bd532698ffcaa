// A block of out[r, c] = alpha * row_scale[r] * col_scale[c] * in[r, c], between any strides and dtypes.
//
// Rows are copied by vectors, transpositions by blocks of 4 x 4 in registers; anything else goes by element.
#pragma once

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

typedef float v4 __attribute__((vector_size(16)));

PEFTKERN_INLINE v4 load4(const float* p) {
  v4 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
template <class T>
PEFTKERN_INLINE v4 load4(const T* p) {
  return v4{widen_scalar(p[0]), widen_scalar(p[1]), widen_scalar(p[2]), widen_scalar(p[3])};
}
PEFTKERN_INLINE void store4(float* p, v4 x) {
  std::memcpy(p, &x, sizeof(x));
}
template <class T>
PEFTKERN_INLINE void store4(T* p, v4 x) {
  for (int k = 0; k < 4; ++k) put(p + k, x[k]);
}

PEFTKERN_INLINE void transpose4(v4* t) {
#if defined(__clang__)
#define PEFTKERN_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
  typedef int32_t i4 __attribute__((vector_size(16)));
#define PEFTKERN_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, i4{i, j, k, l})
#endif
  const v4 a = PEFTKERN_SHUFFLE(t[0], t[1], 0, 4, 1, 5), b = PEFTKERN_SHUFFLE(t[2], t[3], 0, 4, 1, 5);
  const v4 c = PEFTKERN_SHUFFLE(t[0], t[1], 2, 6, 3, 7), d = PEFTKERN_SHUFFLE(t[2], t[3], 2, 6, 3, 7);
  t[0] = PEFTKERN_SHUFFLE(a, b, 0, 1, 4, 5);
  t[1] = PEFTKERN_SHUFFLE(a, b, 2, 3, 6, 7);
  t[2] = PEFTKERN_SHUFFLE(c, d, 0, 1, 4, 5);
  t[3] = PEFTKERN_SHUFFLE(c, d, 2, 3, 6, 7);
#undef PEFTKERN_SHUFFLE
}

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

  // in contiguous along rows, out along columns.
  void transposed(int64_t r0, int64_t r1, int64_t c0, int64_t c1) const {
    const int64_t r4 = r0 + (r1 - r0) / 4 * 4, c4 = c0 + (c1 - c0) / 4 * 4;
    for (int64_t r = r0; r < r4; r += 4) {
      const v4 factor = {row_factor(r), row_factor(r + 1), row_factor(r + 2), row_factor(r + 3)};
      for (int64_t c = c0; c < c4; c += 4) {
        v4 t[4];
        for (int k = 0; k < 4; ++k) {
          t[k] = load4(in + r + (c + k) * in_col) * factor;
          if (col_scale != nullptr) t[k] *= col_scale[c + k];
        }
        transpose4(t);
        for (int k = 0; k < 4; ++k) store4(out + (r + k) * out_row + c, t[k]);
      }
    }
    elements(r4, r1, c0, c4);
    elements(r0, r1, c4, c1);
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
