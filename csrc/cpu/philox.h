// Dropout bits: Philox4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw, SC 2011), one call per row and 8
// columns.
//
// Element (i, j): counter (j >> 3, i), both 64-bit; output word (j & 7) >> 1, rotated by 16 if j is odd; kept
// iff the word is >= threshold. The same bits as peftkern.ops.dropout_mask.
#pragma once

#include "cpu/simd.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// One call per 64-bit lane, its values in the low halves: a 32 x 32 -> 64 multiply reads only those, so the
// state needs no shuffles, and what is left in the high halves never matters.
constexpr int W64 = W / 2;
typedef uint64_t vq __attribute__((vector_size(4 * W), may_alias));

PEFTKERN_INLINE vq mul_low_halves(vq a, vq b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vq>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vq>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<vq>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffull) * (b & 0xffffffffull);
#endif
}

struct PhiloxWords {
  vq w[4];
};

PEFTKERN_INLINE PhiloxWords philox(vq group, uint64_t row, uint64_t seed) {
  const vq m0 = 0xD2511F53ull - vq{}, m1 = 0xCD9E8D57ull - vq{};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  vq c0 = group, c1 = group >> 32, c2 = row - vq{}, c3 = (row >> 32) - vq{};
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round) {
    const vq p0 = mul_low_halves(c0, m0), p1 = mul_low_halves(c2, m1);
    c0 = (p1 >> 32) ^ c1 ^ (static_cast<uint64_t>(k0) - vq{});
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ (static_cast<uint64_t>(k1) - vq{});
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// bytes[g] = the keep bits of group group0 + g (bit e = column 8 (group0 + g) + e), for g < W.
PEFTKERN_INLINE void keep_bytes(uint64_t seed, uint32_t threshold, uint64_t row, uint64_t group0,
                                uint8_t* bytes) {
  vq even{};
  for (int i = 0; i < W64; ++i) even[i] = 2 * static_cast<uint64_t>(i);
  even += group0;
  const PhiloxWords a = philox(even, row, seed), b = philox(even + 1, row, seed);
  const vu limit = splat_u(threshold);
  vu bits{};
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const vq merged = (a.w[k] & 0xffffffffull) | (b.w[k] << 32);
    const vu z = reinterpret_cast<const vu&>(merged);
    const vi low = z >= limit, high = ((z << 16) | (z >> 16)) >= limit;
    bits |= (reinterpret_cast<const vu&>(low) & (1u << (2 * k))) |
            (reinterpret_cast<const vu&>(high) & (2u << (2 * k)));
  }
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(bits)));
#else
  for (int i = 0; i < W; ++i) bytes[i] = static_cast<uint8_t>(bits[i]);
#endif
}

// Room that keep_bits needs for n columns.
constexpr int64_t keep_bits_room(int64_t n) {
  return n / 8 + 2 * W + 8;
}

// Bit c of `bits` = element (row0 + row, col0 + c) is kept, for c < n (bits past n are arbitrary).
PEFTKERN_INLINE void keep_bits(const Dropout& d, int64_t row, int64_t col, int64_t n, uint8_t* bits) {
  const uint64_t i = static_cast<uint64_t>(d.row0 + row), j = static_cast<uint64_t>(d.col0 + col);
  const int shift = static_cast<int>(j % 8);
  const int64_t bytes = (n + shift + 7) / 8;
  for (int64_t g = 0; g < bytes; g += W) keep_bytes(d.seed, d.threshold, i, j / 8 + g, bits + g);
  if (shift != 0) {
    bits[bytes] = 0;
    for (int64_t g = 0; g < bytes; ++g) {
      bits[g] = static_cast<uint8_t>((bits[g] | (static_cast<uint32_t>(bits[g + 1]) << 8)) >> shift);
    }
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
