// The most that a product can reach on this CPU: fused multiply-adds whose operands stay in registers.
#include "cpu/common/simd.h"
#include "cpu/common/thread.h"
#include "peftkern/cpu.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

// Independent sums: enough to hide an instruction's latency, few enough for the registers: 16 of AVX2, 32 of
// AVX-512, whose products of bf16 take longest.
constexpr int kSums = W == 16 ? 24 : 12;

#if defined(__AVX512BF16__)
constexpr int kFlops = 4 * W;  // two terms a lane
PEFTKERN_INLINE vf multiply_add(vf x, vf y, vf sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh&>(x), reinterpret_cast<__m512bh&>(y));
}
#else
constexpr int kFlops = 2 * W;
PEFTKERN_INLINE vf multiply_add(vf x, vf y, vf sum) {
  return fma(x, y, sum);
}
#endif

}  // namespace

void fma_peak(const PeakArgs& a) {
  parallel(a.threads, [&] {
    const vf x = splat(a.value), y = splat(a.value);
    vf sums[kSums];
    for (vf& sum : sums) sum = zero();
    for (int64_t k = 0; k < a.steps; ++k)
#pragma GCC unroll 24
      for (int i = 0; i < kSums; ++i) sums[i] = multiply_add(x, y, sums[i]);
    vf all = sums[0];
    for (int i = 1; i < kSums; ++i) all = all + sums[i];
    // Read, or the compiler would leave all of it out.
    store(a.sums + thread_number() * kPeakRoom, all);
  });
  *a.flops = static_cast<double>(a.steps) * kSums * kFlops * a.threads;
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
