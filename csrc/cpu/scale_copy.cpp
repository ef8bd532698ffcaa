// out[r, c] = round( alpha * row_scale[r] * col_scale[c] * in[r, c] ), both matrices with any strides.
//
// Brings adapters into the panels that the kernels read (fp32, rows contiguous and padded with zeros), and
// gradients back. Small matrices, O(R (K + N)): a transposition goes through blocks that stay in cache.
#include "cpu/tile.h"
#include "peftkern/launchers.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

PEFTKERN_INLINE void put(float* p, float x) {
  *p = x;
}
PEFTKERN_INLINE void put(bf16* p, float x) {
  store_n(p, splat(x), 1);
}
PEFTKERN_INLINE void put(f16* p, float x) {
  store_n(p, splat(x), 1);
}

constexpr int64_t kBlock = 64;

template <class TO, class TI>
void copy(const ScaleCopyArgs& a) {
  const TI* in = static_cast<const TI*>(a.in.data);
  TO* out = static_cast<TO*>(a.out.data);
  const int64_t row_blocks = (a.rows + kBlock - 1) / kBlock, col_blocks = (a.cols + kBlock - 1) / kBlock;
  const int threads = a.rows * a.cols < 32768 ? 1 : a.threads;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < row_blocks * col_blocks; ++t) {
    const int64_t r0 = t / col_blocks * kBlock, c0 = t % col_blocks * kBlock;
    const int64_t r1 = min64(a.rows, r0 + kBlock), c1 = min64(a.cols, c0 + kBlock);
    for (int64_t r = r0; r < r1; ++r) {
      const float row = a.row_scale != nullptr ? a.alpha * a.row_scale[r] : a.alpha;
      for (int64_t c = c0; c < c1; ++c) {
        const float x = row * widen_scalar(in[r * a.in.row + c * a.in.col]);
        put(out + r * a.out.row + c * a.out.col, a.col_scale != nullptr ? x * a.col_scale[c] : x);
      }
    }
  }
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t c = a.cols; c < a.cols + a.pad; ++c) put(out + r * a.out.row + c * a.out.col, 0.0f);
  }
}

template <class TO>
void copy_from(const ScaleCopyArgs& a) {
  switch (a.in.dtype) {
    case DType::f32:
      return copy<TO, float>(a);
    case DType::bf16:
      return copy<TO, bf16>(a);
    case DType::f16:
      return copy<TO, f16>(a);
  }
}

}  // namespace

void scale_copy(const ScaleCopyArgs& a) {
  switch (a.out.dtype) {
    case DType::f32:
      return copy_from<float>(a);
    case DType::bf16:
      return copy_from<bf16>(a);
    case DType::f16:
      return copy_from<f16>(a);
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
