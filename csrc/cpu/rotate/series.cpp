// Series of skew-symmetric matrices and their gradient, a block per thread at a time:
//
//   R = T_0,   T_k = c_2k I + c_(2k+1) Q + S T_(k+1),   S = Q^2, symmetric
//
// All matrices are in scratch, with rows of ld floats that end in zeros, and are multiplied by the micro
// kernel of the low-rank branch. Backward makes them again: they cost less than their memory.
#include <utility>

#include "cpu/common/thread.h"
#include "cpu/common/tile.h"
#include "cpu/rotate/task.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

// out = x y
void product(const SkewSeriesTask& a, const float* x, const float* y, float* out) {
  const int64_t n = a.size, ld = a.ld;
  int64_t i = 0;
  for (; i + kCombineRows <= n; i += kCombineRows)
    combine_rows<kCombineRows>(x + i * ld, ld, n, y, ld, ld, out + i * ld, ld);
  for (; i + 2 <= n; i += 2) combine_rows<2>(x + i * ld, ld, n, y, ld, ld, out + i * ld, ld);
  for (; i < n; ++i) combine_rows<1>(x + i * ld, ld, n, y, ld, ld, out + i * ld, ld);
}

// out += f x
void add(const SkewSeriesTask& a, float f, const float* x, float* out) {
  for (int64_t i = 0; i < a.size * a.ld; ++i) out[i] += f * x[i];
}

void zero(const SkewSeriesTask& a, float* out) {
  std::memset(out, 0, sizeof(float) * a.size * a.ld);
}

// out += x^T
void add_transposed(const SkewSeriesTask& a, const float* x, float* out) {
  for (int64_t i = 0; i < a.size; ++i) {
    for (int64_t j = 0; j < a.size; ++j) out[i * a.ld + j] += x[j * a.ld + i];
  }
}

void fill(const SkewSeriesTask& a, int64_t g, float* Q) {
  const float* upper = a.upper + g * a.elements;
  zero(a, Q);
  for (int64_t e = 0; e < a.elements; ++e) {
    Q[a.rows[e] * a.ld + a.cols[e]] += upper[e];
    Q[a.cols[e] * a.ld + a.rows[e]] -= upper[e];
  }
}

// The gradient of block g, with T_1, T_2, ... in T; T_0's place and what follows the last is room.
void grad(const SkewSeriesTask& a, int64_t g, const float* Q, const float* S, float* T) {
  const int64_t n = a.size, count = n * a.ld;
  float *d = T, *dQ = T + a.pairs * count, *dS = dQ + count, *step = dS + count, *turned = step + count;
  zero(a, d), zero(a, dQ), zero(a, dS);
  for (int64_t i = 0; i < n; ++i) std::memcpy(d + i * a.ld, a.d + (g * n + i) * n, sizeof(float) * n);
  add(a, a.c[1], d, dQ);
  for (int64_t k = 1; k < a.pairs; ++k) {
    zero(a, turned);
    add_transposed(a, T + k * count, turned);
    product(a, d, turned, step);
    add(a, 1.0f, step, dS);
    product(a, S, d, step);
    std::swap(d, step);
    add(a, a.c[2 * k + 1], d, dQ);
  }
  add(a, a.c[2 * a.pairs], d, dS);
  // Of Q^T dS + dS Q^T, too, what counts is twice the part that is skew-symmetric.
  std::memcpy(turned, dS, sizeof(float) * count);
  add_transposed(a, dS, turned);
  product(a, Q, turned, step);
  add(a, -1.0f, step, dQ);
  float* out = a.out + g * a.elements;
  for (int64_t e = 0; e < a.elements; ++e)
    out[e] = dQ[a.rows[e] * a.ld + a.cols[e]] - dQ[a.cols[e] * a.ld + a.rows[e]];
}

void series(const SkewSeriesTask& a, int64_t g, float* room) {
  const int64_t n = a.size, count = n * a.ld, last = a.pairs - 1;
  float *Q = room, *S = Q + count, *T = S + count;
  fill(a, g, Q);
  product(a, Q, Q, S);
  for (int64_t k = last; k >= (a.d != nullptr ? 1 : 0); --k) {
    float* t = T + k * count;
    if (k == last) {
      zero(a, t);
      add(a, a.c[2 * a.pairs], S, t);
    } else {
      product(a, S, t + count, t);
    }
    add(a, a.c[2 * k + 1], Q, t);
    for (int64_t i = 0; i < n; ++i) t[i * a.ld + i] += a.c[2 * k];
  }
  if (a.d != nullptr) return grad(a, g, Q, S, T);
  for (int64_t i = 0; i < n; ++i) std::memcpy(a.out + (g * n + i) * n, T + i * a.ld, sizeof(float) * n);
}

}  // namespace

void skew_series_run(const SkewSeriesTask& a) {
  parallel(a.threads, [&] {
#pragma omp for schedule(static)
    for (int64_t g = 0; g < a.blocks; ++g) series(a, g, a.scratch + thread_number() * a.thread_floats);
  });
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
