// Vectors of W floats, written once and compiled per instruction set level (PEFTKERN_LEVEL names the
// namespace).
//
// Arithmetic is plain C++ on GCC vector extensions (a * b + c contracts to a fused multiply-add where there
// is one). load and store convert between fp32 and the storage types; the *_n forms touch only the first n
// elements. Half precision stores round to nearest even and keep NaN, infinities and denormals.
#pragma once

#include <cstring>

#include "peftkern/types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#ifndef PEFTKERN_LEVEL
#define PEFTKERN_LEVEL plain
#endif

#define PEFTKERN_INLINE static inline __attribute__((always_inline))

namespace peftkern::cpu::PEFTKERN_LEVEL {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * W), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * W), may_alias));
typedef float vf_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * W), aligned(2), may_alias));

PEFTKERN_INLINE vf zero() {
  return vf{};
}
PEFTKERN_INLINE vf splat(float x) {
  return x - vf{};
}
PEFTKERN_INLINE vu splat_u(uint32_t x) {
  return x - vu{};
}
// a * b + c, rounded once where the level can.
PEFTKERN_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// fp32 bits from half precision bits, one element.
PEFTKERN_INLINE float widen_scalar(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
PEFTKERN_INLINE float widen_scalar(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  uint32_t u;
  float f;
  if (rest >= 0x7c00u) {
    u = (rest << 13) | 0x7f800000u | (rest > 0x7c00u ? 0x00400000u : 0u);
  } else if (rest >= 0x0400u) {
    u = (rest << 13) + 0x38000000u;
  } else {
    f = static_cast<float>(rest) * 0x1p-24f;
    std::memcpy(&u, &f, 4);
  }
  u |= sign;
  std::memcpy(&f, &u, 4);
  return f;
}
PEFTKERN_INLINE float widen_scalar(float x) {
  return x;
}

// Adding 0x7fff, or 0x8000 after an odd upper half, rounds to nearest even; infinities and overflow come out
// right. A NaN could overflow into the sign, so it takes its upper half with the quiet bit set instead.
PEFTKERN_INLINE vh bf16_bits(vf x) {
#if defined(__AVX512F__)
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  return reinterpret_cast<vh>(_mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
#elif defined(__AVX2__)
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return reinterpret_cast<vh>(
      _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1)));
#else
  const vu u = reinterpret_cast<vu&>(x);
  const vu rounded = u + 0x7fffu + ((u >> 16) & 1u), quiet = u | 0x400000u;
  const vi unordered = x != x;
  const vu nan = reinterpret_cast<const vu&>(unordered);
  return __builtin_convertvector(((rounded & ~nan) | (quiet & nan)) >> 16, vh);
#endif
}

#if !defined(__F16C__) && !defined(__AVX512F__)
PEFTKERN_INLINE uint16_t f16_bits_scalar(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000u, rest = u & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((rest >> 13) & 0x3ffu));
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (rest < 0x38800000u) {
    // Adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded to nearest even by the addition.
    float f;
    std::memcpy(&f, &rest, 4);
    f += 0.5f;
    uint32_t r;
    std::memcpy(&r, &f, 4);
    return static_cast<uint16_t>(sign | (r - 0x3f000000u));
  }
  const uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
#endif

PEFTKERN_INLINE vh f16_bits(vf x) {
#if defined(__AVX512F__)
  return reinterpret_cast<vh>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return reinterpret_cast<vh>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  vh h{};
  for (int i = 0; i < W; ++i) h[i] = f16_bits_scalar(x[i]);
  return h;
#endif
}

PEFTKERN_INLINE vf from_bf16_bits(vh h) {
#if defined(__AVX512F__)
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)), 16));
#elif defined(__AVX2__)
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)), 16));
#else
  const vu u = __builtin_convertvector(h, vu) << 16;
  return reinterpret_cast<const vf&>(u);
#endif
}

PEFTKERN_INLINE vf from_f16_bits(vh h) {
#if defined(__AVX512F__)
  // The plain intrinsic draws a false warning about an uninitialised vector from GCC 12.
  return _mm512_maskz_cvtph_ps(static_cast<__mmask16>(-1), reinterpret_cast<__m256i>(h));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h));
#else
  vf x{};
  for (int i = 0; i < W; ++i) x[i] = widen_scalar(f16{h[i]});
  return x;
#endif
}

PEFTKERN_INLINE vf load(const float* p) {
  return *reinterpret_cast<const vf_any*>(p);
}
PEFTKERN_INLINE vf load(const bf16* p) {
  return from_bf16_bits(*reinterpret_cast<const vh_any*>(p));
}
PEFTKERN_INLINE vf load(const f16* p) {
  return from_f16_bits(*reinterpret_cast<const vh_any*>(p));
}

// The first n elements (0 <= n <= W), the rest zero.
PEFTKERN_INLINE vf load_n(const float* p, int n) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
#else
  vf v{};
  std::memcpy(&v, p, sizeof(float) * n);
  return v;
#endif
}
PEFTKERN_INLINE vh load_bits_n(const void* p, int n) {
#if defined(__AVX512F__)
  return reinterpret_cast<vh>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p));
#else
  vh v{};
  std::memcpy(&v, p, sizeof(uint16_t) * n);
  return v;
#endif
}
PEFTKERN_INLINE vf load_n(const bf16* p, int n) {
  return from_bf16_bits(load_bits_n(p, n));
}
PEFTKERN_INLINE vf load_n(const f16* p, int n) {
  return from_f16_bits(load_bits_n(p, n));
}

PEFTKERN_INLINE void store(float* p, vf x) {
  *reinterpret_cast<vf_any*>(p) = x;
}
PEFTKERN_INLINE void store(bf16* p, vf x) {
  *reinterpret_cast<vh_any*>(p) = bf16_bits(x);
}
PEFTKERN_INLINE void store(f16* p, vf x) {
  *reinterpret_cast<vh_any*>(p) = f16_bits(x);
}

// W elements: the first n (0 <= n <= W) of p, then zeros.
PEFTKERN_INLINE void copy_n(const float* p, int n, float* to) {
  store(to, load_n(p, n));
}
template <class Half>
PEFTKERN_INLINE void copy_n(const Half* p, int n, Half* to) {
  *reinterpret_cast<vh_any*>(to) = load_bits_n(p, n);
}

PEFTKERN_INLINE void store_n(float* p, vf x, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), x);
#else
  std::memcpy(p, &x, sizeof(float) * n);
#endif
}
PEFTKERN_INLINE void store_bits_n(void* p, vh x, int n) {
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), reinterpret_cast<__m256i>(x));
#else
  std::memcpy(p, &x, sizeof(uint16_t) * n);
#endif
}
PEFTKERN_INLINE void store_n(bf16* p, vf x, int n) {
  store_bits_n(p, bf16_bits(x), n);
}
PEFTKERN_INLINE void store_n(f16* p, vf x, int n) {
  store_bits_n(p, f16_bits(x), n);
}

// Asks for the cache lines that begin in the N elements from p[c] on, of a walk over p by N; c is a multiple
// of N.
template <int N, class T>
PEFTKERN_INLINE void ask_for(const T* p, int64_t c) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (N < kLine && c % kLine != 0) return;
#pragma GCC unroll 4
  for (int64_t i = 0; i < N; i += kLine) __builtin_prefetch(p + c + i, 0, 3);
}

// x where bit i of the W bits that start at column c of `bits` is set, else exactly 0. c is a multiple of W.
PEFTKERN_INLINE vf select(const uint8_t* bits, int64_t c, vf x) {
#if defined(__AVX512F__)
  uint16_t m;
  std::memcpy(&m, bits + c / 8, 2);
  return _mm512_maskz_mov_ps(m, x);
#else
  const uint32_t m = static_cast<uint32_t>(bits[c / 8]) >> (c % 8);
  vu bit{};
  for (int i = 0; i < W; ++i) bit[i] = 1u << i;
  const vi keep = (splat_u(m) & bit) != 0u;
  const vi v = reinterpret_cast<vi&>(x) & keep;
  return reinterpret_cast<const vf&>(v);
#endif
}

// Transposes the squares of N x N words that lie side by side in N vectors: log2(N) rounds, each interleaving
// rows i and i + N/2.
template <int N = W>
PEFTKERN_INLINE void transpose(vf* r) {
  vi low{}, high{};
  for (int i = 0; i < W; ++i) {
    low[i] = (i & 1) * W + i / N * N + i % N / 2;
    high[i] = low[i] + N / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < N; round *= 2) {
    vf t[N];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      t[2 * i] = __builtin_shuffle(r[i], r[i + N / 2], low);
      t[2 * i + 1] = __builtin_shuffle(r[i], r[i + N / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) r[i] = t[i];
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
