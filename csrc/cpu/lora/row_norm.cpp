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

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

// Rows of a block: whole blocks of combine, and, where w is adjacent along rows, whole cache lines.
constexpr int64_t kRows = 48;
static_assert(kRows % kCombineRows == 0);
// Few enough columns for delta to be read back before it has left the store queue's reach.
constexpr int64_t kStep = kCombineVectors * W;

// acc[lane] += (w + scaling * delta)^2 over n columns.
template <class T>
PEFTKERN_INLINE vf add_squares(const T* w, const float* delta, vf scaling, int64_t n, vf acc) {
  int64_t c = 0;
  for (; c + W <= n; c += W) {
    const vf x = fma(scaling, load(delta + c), load(w + c));
    acc = fma(x, x, acc);
  }
  if (c < n) {
    // Past the end a panel is zero, but zero times an infinite v is not.
    float part[W];
    store(part, fma(scaling, load(delta + c), load_n(w + c, static_cast<int>(n - c))));
    const vf x = load_n(part, static_cast<int>(n - c));
    acc = fma(x, x, acc);
  }
  return acc;
}

// sums[m] += the squares of `cols` columns of row i + m; w, from row i and the first of the columns on, has
// adjacent columns.
template <class T>
void add_rows(const LoraRowNormTask& a, const T* w, int64_t row, int64_t i, int64_t rows, int64_t c0,
              int64_t cols, float* sums) {
  static_assert(kCombineRows == 6);
  alignas(64) float delta[kCombineRows * kStep];
  for (int64_t m = 0, take; m < rows; m += take) {
    // combine takes 1, 2 or kCombineRows rows.
    take = rows - m < kCombineRows ? min64(2, rows - m) : kCombineRows;
    vf acc[8] = {};
    for (int64_t c = 0; c < cols; c += kStep) {
      const int64_t n = min64(kStep, cols - c);
      combine(a.v + (i + m) * a.ldv, a.ldv, take, a.R, a.p + c0 + c, a.ldp, round_up(n, W), delta, kStep);
      for (int64_t r = 0; r < take; ++r)
        acc[r] = add_squares(w + (m + r) * row + c, delta + r * kStep, splat(a.scaling), n, acc[r]);
    }
    add_lane_sums(acc[0], acc[1], acc[2], acc[3], static_cast<int>(min64(take, 4)), sums + m);
    if (take > 4) add_lane_sums(acc[4], acc[5], acc[6], acc[7], static_cast<int>(take - 4), sums + m + 4);
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
    const T* w = static_cast<const T*>(a.w.data) + i0 * a.w.row + c * a.w.col;
    if (a.w.col == 1) {
      add_rows(a, w, a.w.row, i0, rows, c, cols, sums);
    } else {
      const Copy<float, T> copy{w, tile, a.w.row, a.w.col, kTileLd, 1, 1.0f, nullptr, nullptr};
      copy.block(0, rows, 0, cols);
      add_rows<float>(a, tile, kTileLd, i0, rows, c, cols, sums);
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
