// Row norms of the adapted weight, from one read of it:
//
//   out[n] = sqrt( sum_k (w[n, k] + scaling * sum_r v[n, r] * p[r, k])^2 )
//
// Every element of the sum is made before it is squared. |w|^2 + 2 s <w a^T, b> + s^2 b (a a^T) b^T takes as
// many products, and loses what is left where w and the branch nearly cancel. A row's bits depend on K and R,
// not on other rows or threads.
#include "cpu/common/copy.h"
#include "cpu/common/segments.h"
#include "cpu/common/thread.h"
#include "cpu/operand/decode.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

// Rows of a block: whole blocks of combine, and, where w is adjacent along rows, whole cache lines.
constexpr int64_t kRows = 48;
static_assert(kRows % kCombineRows == 0);
// Few enough columns for delta to be read back before it has left the store queue's reach.
constexpr int64_t kStep = kCombineVectors * W;

// acc += (w + scaling * delta)^2, lane by lane, over n <= kStep columns.
template <class T>
PEFTKERN_INLINE vf add_squares(const T* w, const float* delta, vf scaling, int64_t n, vf acc) {
  if (n == kStep) {
#pragma GCC unroll 4
    for (int64_t c = 0; c < kStep; c += W) {
      const vf x = fma(scaling, load(delta + c), load(w + c));
      acc = fma(x, x, acc);
    }
    return acc;
  }
  for (int64_t c = 0; c < n; c += W) {
    const int left = static_cast<int>(min64(W, n - c));
    float part[W];
    store(part, fma(scaling, load(delta + c), load_n(w + c, left)));
    // Past the end a panel is zero, but zero times an infinite v is not.
    const vf x = load_n(part, left);
    acc = fma(x, x, acc);
  }
  return acc;
}

// sums[m] += the squares of `cols` columns of ROWS rows: w and v from the first of the rows on, w and p from
// the first of the columns on. The elements at `next`, laid out as those at w, will be wanted soon.
template <int ROWS, class T>
void add_rows(const LoraRowNormTask& a, const float* v, const float* p, const T* w, const T* next,
              int64_t row, int64_t cols, float* sums) {
  alignas(64) float delta[ROWS * kStep];
  vf acc[8] = {};
  static_assert(ROWS <= 8);
  for (int64_t c = 0; c < cols; c += kStep) {
    const int64_t n = min64(kStep, cols - c);
    combine_rows<ROWS>(v, a.ldv, a.R, p + c, a.ldp, round_up(n, W), delta, kStep);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      prefetch(next + r * row + c, kStep * static_cast<int64_t>(sizeof(T)));
      acc[r] = add_squares(w + r * row + c, delta + r * kStep, splat(a.scaling), n, acc[r]);
    }
  }
  add_lane_sums(acc[0], acc[1], acc[2], acc[3], ROWS < 4 ? ROWS : 4, sums);
  if (ROWS > 4) add_lane_sums(acc[4], acc[5], acc[6], acc[7], ROWS - 4, sums + 4);
}

// sums[m] += the squares of columns [c, c + cols) of row i + m; w, from the first of both on, has adjacent
// columns.
template <class T>
void add_tile(const LoraRowNormTask& a, const T* w, int64_t row, int64_t i, int64_t rows, int64_t c,
              int64_t cols, float* sums) {
  for (int64_t m = 0; m < rows;) {
    const float* v = a.v + (i + m) * a.ldv;
    const T *from = w + m * row, *next = m + kCombineRows < rows ? from + kCombineRows * row : w + cols;
    if (rows - m >= kCombineRows) {
      add_rows<kCombineRows>(a, v, a.p + c, from, next, row, cols, sums + m);
      m += kCombineRows;
    } else {
      add_rows<1>(a, v, a.p + c, from, next, row, cols, sums + m);
      ++m;
    }
  }
}

// tile[m, c] = w[m, c] in fp32, of a w whose columns are not adjacent. A few columns at a time, and all rows
// of them: where they lie a power of two apart, more would push each other out of a cache.
template <class T>
void bring(const ConstMatrix& of, const T* w, int64_t rows, int64_t cols, float* tile) {
  constexpr int64_t kFew = 8, kAhead = 16;
  const Copy<float, T> copy{w, tile, of.row, of.col, kTileLd, 1, 1.0f, nullptr, nullptr};
  for (int64_t c = 0; c < cols; c += kFew) {
    for (int64_t j = c + kAhead; j < c + kAhead + kFew; ++j)
      prefetch(w + j * of.col, rows * static_cast<int64_t>(sizeof(T)));
    copy.block(0, rows, c, min64(cols, c + kFew));
  }
}

// Rows [i0, i1), at most kRows.
template <class T>
void norms(const LoraRowNormTask& a, int64_t i0, int64_t i1) {
  const int64_t rows = i1 - i0;
  float sums[kRows] = {};
  alignas(64) float tile[kRows * kTileLd];
  for (int64_t c = 0; c < a.K; c += kTileCols) {
    const int64_t cols = min64(kTileCols, a.K - c);
    if (a.quantised != nullptr) {
      for (int64_t m = 0; m < rows; ++m) decode(*a.quantised, i0 + m, c, cols, tile + m * kTileLd);
      add_tile<float>(a, tile, kTileLd, i0, rows, c, cols, sums);
      continue;
    }
    const T* w = static_cast<const T*>(a.w.data) + i0 * a.w.row + c * a.w.col;
    if (a.w.col == 1) {
      add_tile(a, w, a.w.row, i0, rows, c, cols, sums);
    } else {
      bring(a.w, w, rows, cols, tile);
      add_tile<float>(a, tile, kTileLd, i0, rows, c, cols, sums);
    }
  }
  for (int64_t m = 0; m < rows; ++m) a.out[i0 + m] = __builtin_sqrtf(sums[m]);
}

}  // namespace

void lora_row_norm_run(const LoraRowNormTask& a) {
  // Smaller blocks keep every thread busy when rows are few.
  const int64_t block = min64(kRows, round_up((a.N + a.threads - 1) / a.threads, kCombineRows));
  const int64_t blocks = block > 0 ? (a.N + block - 1) / block : 0;
  parallel(a.threads, [&] {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < blocks; ++t) {
      const int64_t i0 = t * block, i1 = min64(a.N, i0 + block);
      switch (a.w.dtype) {
        case DType::f32:
          norms<float>(a, i0, i1);
          break;
        case DType::bf16:
          norms<bf16>(a, i0, i1);
          break;
        case DType::f16:
          norms<f16>(a, i0, i1);
          break;
      }
    }
  });
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
