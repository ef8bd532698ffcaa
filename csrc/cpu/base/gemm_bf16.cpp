// The base product of bf16 operands on CPUs with AVX512-BF16: out (fp32) = a B, without an input scale.
// Blocked as blocks.h says; packed elements are pairs of terms that are adjacent along the inner
// dimension, which one instruction multiplies and adds to an fp32 sum.
//
// An element's sum is a chain over at most 2 kBaseChain terms, the chains added in order: as in
// base_gemm.cpp, a row's bits depend on the inner dimension alone. Terms below the normal range of bf16 count
// as zero.
#include "cpu/base/pairs.h"
#include "cpu/operand/dense.h"
#include "cpu/operand/quantised.h"

#if defined(__AVX512BF16__)

namespace peftkern::cpu::PEFTKERN_LEVEL {
void base_gemm_bf16(const BaseArgs& args) {
  args.quantised != nullptr ? run_blocks<Pairs, Decoded<bf16>>(args) : run_blocks<Pairs, Dense<bf16>>(args);
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL

#endif
