// The end of a bottleneck whose products are bf16's: a product is added to the stream, task.h says how.
#include "cpu/bottleneck/task.h"
#include "cpu/common/thread.h"
#include "cpu/common/tile.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

// n columns of a row.
template <class T>
void add_part(float alpha, const uint8_t* bits, const T* delta, const float* scale, const float* bias,
              const bf16* to, int64_t n, bf16* out) {
  const auto element = [&](int64_t c, vf d, vf factor, vf b, vf base) {
    vf x = splat(alpha) * d;
    if (scale != nullptr) x *= factor;
    if (bias != nullptr) x += b;
    return select_if(bits, c, x) + base;
  };
  int64_t c = 0;
  for (; c + W <= n; c += W) {
    const auto at = [c](const auto* p) { return p != nullptr ? load(p + c) : zero(); };
    store(out + c, element(c, load(delta + c), at(scale), at(bias), at(to)));
  }
  if (c == n) return;
  const int left = static_cast<int>(n - c);
  const auto at = [c, left](const auto* p) { return p != nullptr ? load_n(p + c, left) : zero(); };
  store_n(out + c, element(c, at(delta), at(scale), at(bias), at(to)), left);
}

template <class T>
void add(const AddTask& a) {
  const auto at = [](const auto* p, int64_t c) { return p != nullptr ? p + c : nullptr; };
  parallel(a.threads, [&] {
    uint8_t bits[keep_bits_room(kTileCols)];
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.M; ++i) {
      const T* delta = static_cast<const T*>(a.delta.data) + i * a.delta.row;
      const bf16* to = at(static_cast<const bf16*>(a.to.data), i * a.to.row);
      bf16* out = static_cast<bf16*>(a.out.data) + i * a.out.row;
      for (int64_t c = 0; c < a.C; c += kTileCols) {
        const int64_t n = min64(kTileCols, a.C - c);
        const bool drops = a.dropout.threshold != 0;
        if (drops) keep_bits(a.dropout, i, c, n, bits);
        add_part(a.alpha, drops ? bits : nullptr, delta + c, at(a.scale, c), at(a.bias, c), at(to, c), n,
                 out + c);
      }
    }
  });
}

}  // namespace

void add_run(const AddTask& a) {
  a.delta.dtype == DType::f32 ? add<float>(a) : add<bf16>(a);
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
