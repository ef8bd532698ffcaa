// The base product for few rows: one pass over W, widened in registers. a is first turned to fp32 scratch.
//
// Where W is adjacent along the inner dimension (forward): dot products, several rows of a against several of
// W. Where it is adjacent along the output (input gradient): rows of W, times elements of a, added to strips
// of out. The latter has the bits of base_gemm. Neither depends on the number of threads, nor on other rows.
#include "cpu/base_pack.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

// --- dot products -----------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kDotRows = 6, kDotCols = 4;  // 24 accumulators + 4 + 1 of 32 registers
#else
constexpr int kDotRows = 4, kDotCols = 3;  // 12 accumulators + 3 + 1 of 16 registers
#endif
// A lane sums at most this many terms before the lanes are added: a longer chain in fp32 loses accuracy.
constexpr int64_t kDotBlock = kBaseChain * W;

PEFTKERN_INLINE float sum_lanes(vf x) {
#pragma GCC unroll 4
  for (int half = W / 2; half > 0; half /= 2) {
    vi other{};
    for (int i = 0; i < W; ++i) other[i] = i ^ half;
    x += __builtin_shuffle(x, other);
  }
  return x[0];
}

// out[i, j] (+)= a_i . w_j over n elements; `ahead` elements further on lies what is read next.
template <class T, int ROWS, int COLS>
void dots(const float* a, int64_t lda, const T* w, int64_t ldw, int64_t n, int64_t ahead, float* out,
          int64_t ld, bool first) {
  vf acc[ROWS][COLS];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) acc[i][j] = zero();
  const int64_t whole = n / W * W;
  for (int64_t k = 0; k < whole; k += W) {
    vf b[COLS];
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) {
      b[j] = load(w + j * ldw + k);
      __builtin_prefetch(w + j * ldw + k + ahead, 0, 2);
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      const vf x = load(a + i * lda + k);
#pragma GCC unroll 4
      for (int j = 0; j < COLS; ++j) acc[i][j] = fma(x, b[j], acc[i][j]);
    }
  }
  const int left = static_cast<int>(n - whole);
  if (left > 0)
    for (int j = 0; j < COLS; ++j) {
      const vf b = load_n(w + j * ldw + whole, left);
      for (int i = 0; i < ROWS; ++i) acc[i][j] = fma(load_n(a + i * lda + whole, left), b, acc[i][j]);
    }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) {
      float* o = out + i * ld + j;
      const float sum = sum_lanes(acc[i][j]);
      *o = first ? sum : *o + sum;
    }
}

template <class T, int COLS>
void dots_rows(int64_t rows, const float* a, int64_t lda, const T* w, int64_t ldw, int64_t n, int64_t ahead,
               float* out, int64_t ld, bool first) {
  // Evenly spread: 8 rows are 4 + 4, not 6 + 2.
  const int64_t tiles = (rows + kDotRows - 1) / kDotRows, most = (rows + tiles - 1) / tiles;
  for (int64_t i = 0; i < rows; i += most) {
    const float* x = a + i * lda;
    float* o = out + i * ld;
    switch (smaller(most, rows - i)) {
      case 1:
        dots<T, 1, COLS>(x, lda, w, ldw, n, ahead, o, ld, first);
        break;
      case 2:
        dots<T, 2, COLS>(x, lda, w, ldw, n, ahead, o, ld, first);
        break;
      case 3:
        dots<T, 3, COLS>(x, lda, w, ldw, n, ahead, o, ld, first);
        break;
      case 4:
        dots<T, 4, COLS>(x, lda, w, ldw, n, ahead, o, ld, first);
        break;
      case 5:
        dots < T, kDotRows<5 ? kDotRows : 5, COLS>(x, lda, w, ldw, n, ahead, o, ld, first);
        break;
      default:
        dots<T, kDotRows, COLS>(x, lda, w, ldw, n, ahead, o, ld, first);
    }
  }
}

template <class T>
void forward(const BaseArgs& g, const float* a, int64_t lda) {
  const T* w = static_cast<const T*>(g.w);
  const int64_t groups = (g.cols + kDotCols - 1) / kDotCols;
#pragma omp for schedule(dynamic, 16)
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t j = group * kDotCols;
    for (int64_t k = 0; k < g.inner; k += kDotBlock) {
      const int64_t n = smaller(kDotBlock, g.inner - k);
      const T* from = w + j * g.w_out + k;
      float* out = g.out + j;
      if (j + kDotCols <= g.cols) {
        dots_rows<T, kDotCols>(g.rows, a + k, lda, from, g.w_out, n, kDotCols * g.w_out, out, g.ld, k == 0);
      } else {
        for (int64_t c = 0; c < g.cols - j; ++c)
          dots_rows<T, 1>(g.rows, a + k, lda, from + c * g.w_out, g.w_out, n, g.w_out, out + c, g.ld, k == 0);
      }
    }
  }
}

// --- rows of W added up -----------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kSteps = 8;  // rows of W held at once, two vectors each
#else
constexpr int kSteps = 4;
#endif
constexpr int64_t kStripFloats = 8192;  // a strip of partial sums for all rows of a: 32 KB

// sums[i][0..2W) += sum over STEPS rows of W of a[i][.] * w[.][0..2W); `left` columns exist.
template <class T, int STEPS>
PEFTKERN_INLINE void add_rows(int64_t rows, const float* a, int64_t lda, const T* w, int64_t ldw,
                              int64_t left, float* sums, int64_t ld) {
  vf b[STEPS][2];
  if (left >= kTileCols) {
#pragma GCC unroll 8
    for (int s = 0; s < STEPS; ++s) {
      b[s][0] = load(w + s * ldw);
      b[s][1] = load(w + s * ldw + W);
    }
  } else {
    const int n0 = static_cast<int>(smaller(W, left)), n1 = static_cast<int>(left - n0);
#pragma GCC unroll 8
    for (int s = 0; s < STEPS; ++s) {
      b[s][0] = load_n(w + s * ldw, n0);
      b[s][1] = n1 > 0 ? load_n(w + s * ldw + W, n1) : zero();
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* o = sums + i * ld;
    vf s0 = load(o), s1 = load(o + W);
#pragma GCC unroll 8
    for (int s = 0; s < STEPS; ++s) {
      const vf x = splat(a[i * lda + s]);
      s0 = fma(x, b[s][0], s0);
      s1 = fma(x, b[s][1], s1);
    }
    store(o, s0);
    store(o + W, s1);
  }
}

template <class T>
void strip(const BaseArgs& g, const float* a, int64_t lda, int64_t col, int64_t cols, int64_t ld) {
  alignas(64) float sums[kStripFloats];
  for (int64_t k0 = 0; k0 < g.inner; k0 += kBaseChain) {
    const int64_t end = smaller(g.inner, k0 + kBaseChain);
    for (int64_t i = 0; i < g.rows * ld; i += W) store(sums + i, zero());
    int64_t k = k0;
    for (; k + kSteps <= end; k += kSteps) {
      const T* w = static_cast<const T*>(g.w) + k * g.w_in + col;
      for (int64_t c = 0; c < cols; c += kTileCols)
        add_rows<T, kSteps>(g.rows, a + k, lda, w + c, g.w_in, cols - c, sums + c, ld);
    }
    for (; k < end; ++k) {
      const T* w = static_cast<const T*>(g.w) + k * g.w_in + col;
      for (int64_t c = 0; c < cols; c += kTileCols)
        add_rows<T, 1>(g.rows, a + k, lda, w + c, g.w_in, cols - c, sums + c, ld);
    }
    for (int64_t i = 0; i < g.rows; ++i) {
      float* out = g.out + i * g.ld + col;
      for (int64_t c = 0; c < cols; ++c) out[c] = k0 == 0 ? sums[i * ld + c] : out[c] + sums[i * ld + c];
    }
  }
}

template <class T>
void input_gradient(const BaseArgs& g, const float* a, int64_t lda) {
  // Strips as wide as the scratch allows, at least one per thread. Their width does not change any bits.
  int64_t width = kStripFloats / g.rows / kTileCols * kTileCols;
  const int64_t share = (g.cols + g.threads - 1) / g.threads;
  width = smaller(width, (share + kTileCols - 1) / kTileCols * kTileCols);
  const int64_t strips = (g.cols + width - 1) / width;
#pragma omp for schedule(dynamic)
  for (int64_t s = 0; s < strips; ++s)
    strip<T>(g, a, lda, s * width, smaller(width, g.cols - s * width), width);
}

template <class T>
void run(const BaseArgs& g) {
  const int64_t lda = (g.inner + W - 1) / W * W + W;
#pragma omp parallel num_threads(g.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.rows; ++i)
      pack_row(static_cast<const T*>(g.a) + i * g.a_row, g.a_col, g.inner, g.scale, g.scratch + i * lda);
    if (g.w_in == 1)
      forward<T>(g, g.scratch, lda);
    else
      input_gradient<T>(g, g.scratch, lda);
  }
}

}  // namespace

void base_few(const BaseArgs& args) {
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
