// What codes of 4 and of 8 bits stand for, W of them at once.
#pragma once

#include "cpu/common/simd.h"
#include "peftkern/code_values.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// The values of W codes in the lower 4 bits of each lane; what lies above them does not count.
struct Values16 {
#if defined(__AVX512F__)
  vf all;
  Values16() = default;
  explicit Values16(const float* v) : all(load(v)) {}
  PEFTKERN_INLINE vf look_up(const Values16& t, vu q) {
    return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(q), t.all);
  }
#elif defined(__AVX2__)
  vf low, high;
  Values16() = default;
  explicit Values16(const float* v) : low(load(v)), high(load(v + 8)) {}
  PEFTKERN_INLINE vf look_up(const Values16& t, vu q) {
    const auto i = reinterpret_cast<__m256i>(q);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, i), _mm256_permutevar8x32_ps(t.high, i),
                            _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
  }
#else
  const float* v;
  Values16() = default;
  explicit Values16(const float* values) : v(values) {}
  PEFTKERN_INLINE vf look_up(const Values16& t, vu q) {
    vf x{};
    for (int i = 0; i < W; ++i) x[i] = t.v[q[i] & 15u];
    return x;
  }
#endif
};

// W bytes, one a lane.
PEFTKERN_INLINE vu widen_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vu>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<vu>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vu x{};
  for (int i = 0; i < W; ++i) x[i] = p[i];
  return x;
#endif
}

// The W codes of W / 2 bytes, each in the lower 4 bits of its lane; what lies above them is of no account.
// UPPER: the first of two is in the upper bits.
template <bool UPPER>
PEFTKERN_INLINE vu spread(const uint8_t* p) {
  vu shift{};
  for (int i = 0; i < W; ++i) shift[i] = (W > 4 ? 8 * (i % 8 / 2) : 0) + ((i % 2 == 0) == UPPER ? 4 : 0);
#if defined(__AVX512F__)
  // Two broadcasts from memory spare two shuffles.
  int32_t first, second;
  std::memcpy(&first, p, 4), std::memcpy(&second, p + 4, 4);
  const __m512i x = _mm512_mask_set1_epi32(_mm512_set1_epi32(first), 0xff00, second);
  return reinterpret_cast<vu>(x) >> shift;
#elif defined(__AVX2__)
  int32_t all;
  std::memcpy(&all, p, 4);
  return reinterpret_cast<vu>(_mm256_set1_epi32(all)) >> shift;
#else
  vu x{};
  for (int i = 0; i < W; ++i) x[i] = p[i / 2];
  return x >> shift;
#endif
}

// Codes of 8 bits, by the bits of fp16: e5m2 are its upper half, and e4m3 those of a number 2^8 times as
// small, but for its NaN.
PEFTKERN_INLINE float value8(Quantised::Code code, uint8_t q) {
  const auto bits = static_cast<uint16_t>(q);
  if (code == Quantised::Code::int8) return static_cast<float>(static_cast<int8_t>(q));
  if (code == Quantised::Code::e5m2) return widen_scalar(f16{static_cast<uint16_t>(bits << 8)});
  if ((bits & 0x7f) == 0x7f) return __builtin_nanf("");
  return widen_scalar(f16{static_cast<uint16_t>((bits & 0x80) << 8 | (bits & 0x7f) << 7)}) * 256.0f;
}

template <Quantised::Code CODE>
PEFTKERN_INLINE vf values8(const uint8_t* p) {
  const vu q = widen_bytes(p);
  if constexpr (CODE == Quantised::Code::int8) {
    const vi signed_q = reinterpret_cast<const vi&>(q) << 24 >> 24;
    return __builtin_convertvector(signed_q, vf);
  } else if constexpr (CODE == Quantised::Code::e5m2) {
    return from_f16_bits(__builtin_convertvector(q << 8, vh));
  } else {
    const vf x = from_f16_bits(__builtin_convertvector((q & 0x80u) << 8 | (q & 0x7fu) << 7, vh)) * 256.0f;
    const vi nan = (q & 0x7fu) == 0x7fu;
    const vi bits = reinterpret_cast<const vi&>(x) | (nan & 0x7fc00000);
    return reinterpret_cast<const vf&>(bits);
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
