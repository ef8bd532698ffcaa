// The steps of a pass over the low-rank branch, with what they have in common: panels, vectors, threads.
#pragma once

#include "cpu/common/kept_scratch.h"
#include "cpu/common/views.h"
#include "peftkern/cpu.h"

namespace peftkern::cpu {

// An adapter as the kernels read it: fp32, a row per rank, rows padded with zeros.
struct Panel {
  const float* data;
  int64_t ld;
};

// A vector of n elements in contiguous fp32; null stays null.
inline const float* as_floats(const ConstMatrix& v, int64_t n, KeptScratch& scratch) {
  if (v.data == nullptr || (v.dtype == DType::f32 && v.col == 1)) return static_cast<const float*>(v.data);
  float* out = scratch.take(n);
  scale_copy({v, {out, DType::f32, n, 1}, 1, n, 0, 1.0f, nullptr, nullptr, 1});
  return out;
}

// The adapter (R, C) times alpha and the scales: itself if it is a panel, else a packed copy.
inline Panel as_panel(const ConstMatrix& adapter, int64_t R, int64_t C, float alpha, const float* row_scale,
                      const float* col_scale, int threads, KeptScratch& scratch) {
  const bool plain = alpha == 1.0f && row_scale == nullptr && col_scale == nullptr;
  if (plain && adapter.dtype == DType::f32 && C % kPadColumns == 0 && adapter.col == 1 && adapter.row >= C)
    return {static_cast<const float*>(adapter.data), adapter.row};
  const int64_t ld = padded(C);
  float* out = scratch.take(R * ld);
  scale_copy({adapter,
              {out, DType::f32, ld, 1},
              R,
              C,
              ld - C,
              alpha,
              row_scale,
              col_scale,
              worth_threads(4 * R * C, threads)});
  return {out, ld};
}

inline void fill_zeros(float* p, int64_t floats) {
  if (p != nullptr) std::fill_n(p, floats, 0.0f);
}

// lora_reduce, with zeros where there is nothing to add up (an operand without elements may be null).
inline void reduce(LoraReduceArgs args, int threads) {
  if (args.M == 0 || args.C == 0 || (args.R == 0 && args.colsum == nullptr)) {
    fill_zeros(args.out, args.M * args.R);
    fill_zeros(args.g, args.R * args.C);
    fill_zeros(args.colsum, args.C);
    return;
  }
  args.ldo = args.ldv = args.R, args.ldg = args.C;
  args.threads = worth_threads(args.M * args.C * std::max<int64_t>(args.R, 1), threads);
  lora_reduce(args);
}

// The sums over rows keep up to a few dozen copies of an (R, C) gradient. With more elements than this only a
// few copies fit, too few to occupy the threads, so the operand is read twice: by rows for the products with
// p, by columns for the sums.
constexpr int64_t kFusedElements = int64_t{1} << 20;

// Both kinds of results of one operand, or either, with `reduce`.
inline void reduce_both(const LoraReduceArgs& args, int threads) {
  LoraReduceArgs dot = args, sums = args;
  dot.v = nullptr, dot.g = nullptr, dot.colsum = nullptr;
  if (args.R * args.C > kFusedElements) {
    sums.p = nullptr, sums.out = nullptr;
    if (args.out != nullptr) reduce(dot, threads);
  }
  if (sums.out != nullptr || sums.g != nullptr || sums.colsum != nullptr) reduce(sums, threads);
}

// m[r, c] *= rows[r] * cols[c]; either may be null.
inline void scale_in_place(float* m, int64_t R, int64_t C, const float* rows, const float* cols) {
  for (int64_t r = 0; rows != nullptr && r < R; ++r)
    for (int64_t c = 0; c < C; ++c) m[r * C + c] *= rows[r];
  for (int64_t r = 0; cols != nullptr && r < R; ++r)
    for (int64_t c = 0; c < C; ++c) m[r * C + c] *= cols[c];
}

// column_dot, likewise.
inline void dot_columns(const ConstMatrix& a, const ConstMatrix& b, int64_t M, int64_t C, float* out,
                        bool accumulate, int threads) {
  if (M > 0 && C > 0) {
    column_dot({a, b, M, C, out, accumulate, worth_threads(M * C, threads)});
  } else if (!accumulate) {
    fill_zeros(out, C);
  }
}

}  // namespace peftkern::cpu
