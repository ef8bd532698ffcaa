// The base product of few rows of bf16 on CPUs with AVX512-BF16, multiplied in pairs of terms. Codes of a
// quantised W become vectors of bf16, those of 4 bits by look-up in a table of what the codes of their group
// stand for.
//
// As with other products of pairs, elements of W are rounded to bf16, and numbers below its normal range
// count as zero. A row's bits depend on the inner dimension alone.
#include "cpu/base/few/code_dots.h"
#include "cpu/base/few/strips_bf16.h"

#if defined(__AVX512BF16__)

namespace peftkern::cpu::PEFTKERN_LEVEL {

void base_few_bf16(const BaseArgs& g) {
  if (g.quantised == nullptr) {
    parallel(g.threads, [&] { g.w_in == 1 ? pair_dot_products(g) : add_pair_strips(g); });
    return;
  }
  with_pairs(*g.quantised, [&](const auto& form, const auto& groups) {
    using Form = std::decay_t<decltype(form)>;
    using Groups = std::decay_t<decltype(groups)>;
    parallel(g.threads, [&] {
      if (g.w_in != 1) return add_pair_strips(g, form, groups);
      if constexpr (Form::kFourBits) {
        using Lines = LineReader<Form, Groups>;
        if (Lines::fits(*g.quantised)) return pair_dot_products(g, Lines{form, groups});
      }
      pair_dot_products(g, PairReader<Form, Groups>{form, groups});
    });
  });
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL

#endif
