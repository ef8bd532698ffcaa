// Dropout bits: Philox4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw, SC 2011), one call per row and 8
// columns.
//
// Element (i, j): counter (j >> 3, i), both 64-bit; output word (j & 7) >> 1, rotated by 16 if j is odd; kept
// iff the word is >= threshold. The same bits as peftkern.ops.dropout_mask.
#pragma once

#include "cpu/common/simd.h"

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

// x >> 32 in every 64-bit lane; what lands in the high halves does not matter. With 512 bits a shuffle does
// it beside the multiplies, where a shift would compete with them.
PEFTKERN_INLINE vq high_halves(vq x) {
#if defined(__AVX512F__)
  return reinterpret_cast<vq>(_mm512_shuffle_epi32(reinterpret_cast<__m512i>(x), _MM_PERM_DDBB));
#else
  return x >> 32;
#endif
}

// The low halves of a in the even 32-bit lanes, those of b in the odd ones.
PEFTKERN_INLINE vu interleave_low_halves(vq a, vq b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vu>(_mm512_mask_shuffle_epi32(reinterpret_cast<__m512i>(a), 0xaaaa,
                                                        reinterpret_cast<__m512i>(b), _MM_PERM_CCAA));
#elif defined(__AVX2__)
  const __m256i odd = _mm256_shuffle_epi32(reinterpret_cast<__m256i>(b), 0xa0);
  return reinterpret_cast<vu>(_mm256_blend_epi32(reinterpret_cast<__m256i>(a), odd, 0xaa));
#else
  return reinterpret_cast<vu>((a & 0xffffffffull) | (b << 32));
#endif
}

// bits, with `bit` added in the lanes where z >= limit.
PEFTKERN_INLINE vu mark_kept(vu bits, vu z, vu limit, uint32_t bit) {
#if defined(__AVX512F__)
  const __m512i b = reinterpret_cast<__m512i>(bits);
  const __mmask16 kept =
      _mm512_cmpge_epu32_mask(reinterpret_cast<__m512i>(z), reinterpret_cast<__m512i>(limit));
  return reinterpret_cast<vu>(_mm512_mask_or_epi32(b, kept, b, _mm512_set1_epi32(static_cast<int>(bit))));
#else
  const vi kept = z >= limit;
  return bits | (reinterpret_cast<vu>(kept) & bit);
#endif
}

// The low byte of every lane.
PEFTKERN_INLINE void store_low_bytes(uint8_t* p, vu x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)
  const __m256i v = reinterpret_cast<__m256i>(x);
  const __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(h, h));
#else
  for (int i = 0; i < W; ++i) p[i] = static_cast<uint8_t>(x[i]);
#endif
}

// Four words for each 64-bit lane of `group` (garbage in the high halves), row and seed the same for all.
template <int N>
PEFTKERN_INLINE void philox(const vq* group, uint64_t row, uint64_t seed, vq (*words)[4]) {
  const vq m0 = 0xD2511F53ull - vq{}, m1 = 0xCD9E8D57ull - vq{};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  vq c[N][4];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    c[n][0] = group[n];
    c[n][1] = high_halves(group[n]);
    c[n][2] = row - vq{};
    c[n][3] = (row >> 32) - vq{};
  }
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const vq p0 = mul_low_halves(c[n][0], m0), p1 = mul_low_halves(c[n][2], m1);
      c[n][0] = high_halves(p1) ^ c[n][1] ^ (static_cast<uint64_t>(k0) - vq{});
      c[n][1] = p1;
      c[n][2] = high_halves(p0) ^ c[n][3] ^ (static_cast<uint64_t>(k1) - vq{});
      c[n][3] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) words[n][k] = c[n][k];
  }
}

// Groups per call of keep_bytes: two vectors of calls, or four where registers allow.
#if defined(__AVX512F__)
constexpr int kPairs = 2;
#else
constexpr int kPairs = 1;
#endif
constexpr int kKeepGroups = kPairs * W;

// bytes[g] = the keep bits of group group0 + g (bit e = column 8 (group0 + g) + e), for g < kKeepGroups.
PEFTKERN_INLINE void keep_bytes(uint64_t seed, uint32_t threshold, uint64_t row, uint64_t group0,
                                uint8_t* bytes) {
  vq groups[2 * kPairs], words[2 * kPairs][4];
  for (int i = 0; i < W64; ++i) groups[0][i] = 2 * static_cast<uint64_t>(i);
  groups[0] += group0;
  groups[1] = groups[0] + 1;
  for (int n = 2; n < 2 * kPairs; ++n) groups[n] = groups[n - 2] + W;
  philox<2 * kPairs>(groups, row, seed, words);
  const vu limit = splat_u(threshold);
#pragma GCC unroll 2
  for (int n = 0; n < kPairs; ++n) {
    vu bits{};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const vu z = interleave_low_halves(words[2 * n][k], words[2 * n + 1][k]);
      bits = mark_kept(bits, z, limit, 1u << (2 * k));
      bits = mark_kept(bits, (z << 16) | (z >> 16), limit, 2u << (2 * k));
    }
    store_low_bytes(bytes + n * W, bits);
  }
}

// Room that keep_bits needs for n columns.
constexpr int64_t keep_bits_room(int64_t n) {
  return n / 8 + kKeepGroups + 8;
}

// Bit c of `bits` = element (row0 + row, col0 + c) is kept, for c < n (bits past n are arbitrary).
PEFTKERN_INLINE void keep_bits(const Dropout& d, int64_t row, int64_t col, int64_t n, uint8_t* bits) {
  const uint64_t i = static_cast<uint64_t>(d.row0 + row), j = static_cast<uint64_t>(d.col0 + col);
  const int shift = static_cast<int>(j % 8);
  const int64_t bytes = (n + shift + 7) / 8;
  for (int64_t g = 0; g < bytes; g += kKeepGroups) keep_bytes(d.seed, d.threshold, i, j / 8 + g, bits + g);
  if (shift != 0) {
    bits[bytes] = 0;
    for (int64_t g = 0; g < bytes; ++g) {
      bits[g] = static_cast<uint8_t>((bits[g] | (static_cast<uint32_t>(bits[g + 1]) << 8)) >> shift);
    }
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
