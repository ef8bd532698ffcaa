// The low-rank update of an output, rounded once:
//
//   out[i, c] = round( base_scale[c] * src[i, c] + drop'(alpha * sum_r v[i, r] * p[r, c]) + bias[c] )
//
// src may be out itself, another matrix (a panel of fp32 products, for one) or absent (zero). drop' zeroes
// what dropout dropped. Every element is computed on its own, so panels and threads never change bits.
#include "cpu/common/thread.h"
#include "cpu/lora/expand_block.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

constexpr int64_t kRowBlock = 48;

template <class TO, class TS>
void expand(const LoraExpandArgs& a) {
  const int64_t panels = (a.C + kTileCols - 1) / kTileCols;
  const int64_t blocks = (a.M + kRowBlock - 1) / kRowBlock;
  parallel(a.threads, [&] {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < blocks * panels; ++t) {
      const int64_t i0 = t / panels * kRowBlock, c0 = t % panels * kTileCols;
      expand_block<TO, TS>(a, a.p, i0, min64(a.M, i0 + kRowBlock), c0, min64(kTileCols, a.C - c0));
    }
  });
}

}  // namespace

void lora_expand(const LoraExpandArgs& a) {
  // Nothing to add: the product is where it belongs.
  const bool changes = a.R > 0 || a.base_scale != nullptr || a.bias != nullptr;
  if (!changes && a.src.data == a.out.data) return;
  const bool wide = a.src.dtype == DType::f32;
  switch (a.out.dtype) {
    case DType::f32:
      return expand<float, float>(a);
    case DType::bf16:
      return wide ? expand<bf16, float>(a) : expand<bf16, bf16>(a);
    case DType::f16:
      return wide ? expand<f16, float>(a) : expand<f16, f16>(a);
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
