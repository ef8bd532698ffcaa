// The base product for few rows: one pass over W, widened in registers. a is first turned to fp32 scratch.
// Neither way depends on the number of threads, nor does a row on other rows.
#include "cpu/base/few/decoded.h"
#include "cpu/common/thread.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

template <class B>
void run(const BaseArgs& g) {
  const B w(g);
  const bool dots = g.w_in == 1;
  const int64_t lda = (g.inner + W - 1) / W * W + W;  // of a packed row, for strips
  parallel(g.threads, [&] {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.rows; ++i)
      if (dots)
        pack_dot_row(g, w, i);
      else
        pack_row(static_cast<const typename B::Activation*>(g.a) + i * g.a_row, g.a_col, g.inner, g.scale,
                 g.scratch + i * lda);
    if (dots)
      dot_products(g, w);
    else
      add_strips(g, w, g.scratch, lda);
  });
}

template <class T>
void run_either(const BaseArgs& g) {
  g.quantised != nullptr ? run<Decoded<T>>(g) : run<Dense<T>>(g);
}

}  // namespace

void base_few(const BaseArgs& args) {
  switch (args.dtype) {
    case DType::f32:
      return run_either<float>(args);
    case DType::bf16:
      if (args.scale == nullptr && base_gemm_bf16_usable() &&
          (args.quantised == nullptr || has_pairs(*args.quantised)))
        return base_few_bf16(args);
      return run_either<bf16>(args);
    case DType::f16:
      return run_either<f16>(args);
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
