// What the codes of a group have in common, and the ways in which a weight holds it.
#pragma once

#include "cpu/common/simd.h"
#include "peftkern/quantised.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// A scale, or a zero too.
struct Scale {
  float scale;
  float apply(float x) const { return x * scale; }
};
struct Affine {
  float scale, zero;
  float apply(float x) const { return (x - zero) * scale; }
};
PEFTKERN_INLINE vf apply(const Scale& f, vf x) {
  return x * splat(f.scale);
}
PEFTKERN_INLINE vf apply(const Affine& f, vf x) {
  return (x - splat(f.zero)) * splat(f.scale);
}

PEFTKERN_INLINE float number(Quantised::Number type, const void* data, int64_t i) {
  using Number = Quantised::Number;
  switch (type) {
    case Number::bf16:
      return widen_scalar(static_cast<const bf16*>(data)[i]);
    case Number::f16:
#if defined(__AVX2__)
      return _cvtsh_ss(static_cast<const f16*>(data)[i].bits);
#else
      return widen_scalar(static_cast<const f16*>(data)[i]);
#endif
    case Number::e8m0: {
      // 2^(e - 127); all bits set is NaN, and 2^-127 is below the normal numbers.
      const uint32_t e = static_cast<const uint8_t*>(data)[i];
      const uint32_t bits = e == 255 ? 0x7fc00000u : e == 0 ? 0x00400000u : e << 23;
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    }
    default:
      return static_cast<const float*>(data)[i];
  }
}

// The ways in which groups hold theirs.
struct Floats {
  static bool fit(const Quantised& w) {
    return w.number == Quantised::Number::f32 && w.zeros == nullptr && w.block_bytes == 0;
  }
  const float* scales;
  explicit Floats(const Quantised& w) : scales(static_cast<const float*>(w.scales)) {}
  Scale of(int64_t g) const { return {scales[g]}; }
};
// The same with zeros.
struct Shifted {
  static bool fit(const Quantised& w) {
    return w.number == Quantised::Number::f32 && w.zeros != nullptr && w.block_bytes == 0;
  }
  const float *scales, *zeros;
  explicit Shifted(const Quantised& w)
      : scales(static_cast<const float*>(w.scales)), zeros(static_cast<const float*>(w.zeros)) {}
  Affine of(int64_t g) const { return {scales[g], zeros[g]}; }
};
struct Nested {
  const Quantised& w;
  const int shift;
  explicit Nested(const Quantised& q) : w(q), shift(__builtin_ctzll(static_cast<uint64_t>(q.outer_group))) {}
  Scale of(int64_t g) const {
    return {w.book[static_cast<const uint8_t*>(w.scales)[g]] * w.outer[g >> shift] + *w.offset};
  }
};
struct InBlocks {
  const Quantised& w;
  explicit InBlocks(const Quantised& q) : w(q) {}
  Scale of(int64_t g) const {
    f16 scale;
    std::memcpy(&scale, static_cast<const uint8_t*>(w.scales) + g * w.block_bytes, sizeof scale);
    return {widen_scalar(scale)};
  }
};
struct Numbers {
  const Quantised& w;
  explicit Numbers(const Quantised& q) : w(q) {}
  Affine of(int64_t g) const {
    return {number(w.number, w.scales, g), w.zeros != nullptr ? number(w.number, w.zeros, g) : 0.0f};
  }
};

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
