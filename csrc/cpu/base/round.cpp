// Rows of an activation as codes of 8 bits with a scale each: what meets the codes of a weight.
//
// Computed in fp32, one operation after the other, so that codes are those of the definition in
// peftkern/bases/int8.py at every level.
#include "cpu/base/pack.h"
#include "cpu/common/thread.h"
#include "peftkern/cpu.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

typedef int8_t v8 __attribute__((vector_size(W)));

// Elements of a row that are widened and scaled at a time.
constexpr int64_t kRun = 512;
// 1.5 * 2^23: a sum with it is rounded to the nearest integer, of two the even one, which its low bits hold.
constexpr float kMagic = 0x1.8p23f;
constexpr uint32_t kMagicBits = 0x4b400000u, kInfinity = 0x7f800000u;
constexpr float kLevels = 127.0f;
// What is smaller counts as this, as a largest magnitude: the quotient by it is finite.
constexpr float kLeast = 1e-30f;

// Elements k, k + 1, ... of a row, each times its scales, with zeros up to whole vectors; how many there are.
template <class T>
PEFTKERN_INLINE int64_t read_run(const RoundRowsArgs& g, int64_t i, int64_t k, float* to) {
  const int64_t n = smaller(kRun, g.C - k);
  pack_row(static_cast<const T*>(g.in.data) + i * g.in.row + k * g.in.col, g.in.col, n,
           g.scale != nullptr ? g.scale + k : nullptr, to);
  if (g.second != nullptr) pack_row(to, 1, n, g.second + k, to);
  for (int64_t c = n; c % W != 0; ++c) to[c] = 0.0f;
  return n;
}

// The bits of the largest magnitude: those of a NaN, if there is one, are larger than infinity's.
template <class T>
uint32_t largest(const RoundRowsArgs& g, int64_t i) {
  alignas(64) float run[kRun];
  vu most{};
  for (int64_t k = 0; k < g.C; k += kRun) {
    const int64_t n = read_run<T>(g, i, k, run);
    for (int64_t c = 0; c < n; c += W) {
      const vf x = load(run + c);
      const vu bits = reinterpret_cast<const vu&>(x) & 0x7fffffffu;
      most = bits > most ? bits : most;
    }
  }
  uint32_t result = 0;
  for (int c = 0; c < W; ++c) result = most[c] > result ? most[c] : result;
  return result;
}

template <class T>
void round_row(const RoundRowsArgs& g, int64_t i) {
  const uint32_t bits = largest<T>(g, i);
  float most;
  std::memcpy(&most, &bits, 4);
  const bool finite = bits < kInfinity;
  most = most < kLeast ? kLeast : most;
  const vf factor = splat(finite ? 1.0f / most * kLevels : 0.0f);
  alignas(64) float run[kRun];
  vu sum{};
  int8_t* to = g.codes + i * g.ld;
  for (int64_t k = 0; k < g.C; k += kRun) {
    const int64_t n = read_run<T>(g, i, k, run);
    for (int64_t c = 0; c < n; c += W) {
      vf x = load(run + c) * factor;
#if !defined(PEFTKERN_X86_LEVELS)
      asm("" : "+m"(x));  // rounded before the sum, where compilers may fuse
#endif
      x += kMagic;
      const vu code = reinterpret_cast<const vu&>(x) - kMagicBits;
      sum += code;
      const v8 codes = __builtin_convertvector(reinterpret_cast<const vi&>(code), v8);
      std::memcpy(to + k + c, &codes, W);
    }
  }
  const int64_t end = (g.C + W - 1) / W * W;
  std::memset(to + end, 0, static_cast<size_t>(g.ld - end));
  uint32_t total = 0;
  for (int c = 0; c < W; ++c) total += sum[c];
  g.row_sum[i] = static_cast<int32_t>(total);
  g.row_scale[i] = finite ? most / kLevels : __builtin_nanf("");
}

template <class T>
void run(const RoundRowsArgs& g) {
  parallel(g.threads, [&] {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.rows; ++i) round_row<T>(g, i);
  });
}

}  // namespace

void round_rows(const RoundRowsArgs& args) {
  switch (args.in.dtype) {
    case DType::f32:
      return run<float>(args);
    case DType::bf16:
      return run<bf16>(args);
    case DType::f16:
      return run<f16>(args);
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
