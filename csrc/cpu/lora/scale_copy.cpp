// out[r, c] = round( alpha * row_scale[r] * col_scale[c] * in[r, c] ), both matrices with any strides.
//
// Brings adapters into the panels that the kernels read (fp32, rows contiguous and padded with zeros), and
// gradients back: O(R (K + N)) elements, on the path of every call.
#include "cpu/common/copy.h"
#include "cpu/common/thread.h"
#include "peftkern/cpu.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

constexpr int64_t kBlock = 64;

template <class TO, class TI>
void copy(const ScaleCopyArgs& a) {
  const Copy<TO, TI> task{static_cast<const TI*>(a.in.data),
                          static_cast<TO*>(a.out.data),
                          a.in.row,
                          a.in.col,
                          a.out.row,
                          a.out.col,
                          a.alpha,
                          a.row_scale,
                          a.col_scale};
  const int64_t row_blocks = (a.rows + kBlock - 1) / kBlock, col_blocks = (a.cols + kBlock - 1) / kBlock;
  parallel(a.threads, [&] {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < row_blocks * col_blocks; ++t) {
      const int64_t r0 = t / col_blocks * kBlock, c0 = t % col_blocks * kBlock;
      task.block(r0, min64(a.rows, r0 + kBlock), c0, min64(a.cols, c0 + kBlock));
    }
  });
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t c = a.cols; c < a.cols + a.pad; ++c) put(task.out + r * a.out.row + c * a.out.col, 0.0f);
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
