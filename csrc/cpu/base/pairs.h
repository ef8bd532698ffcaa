// 2 W elements of W at once, as two vectors of fp32. Widening bf16 in its own order costs a shuffle per
// vector; taking its even and its odd elements apart costs a shift and a mask. What meets such a pair has to
// be in the same order.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/common/simd.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

constexpr int kPair = 2 * W;

typedef uint32_t vu_any __attribute__((vector_size(4 * W), aligned(2), may_alias));

// Elements of a cache line, or of a pair if that is longer.
template <class T>
constexpr int kLineOrPair = 64 / sizeof(T) < kPair ? kPair : 64 / sizeof(T);

// Starts to load N elements into a level of cache (3: L1, 2: L2).
template <int N, int LEVEL, class T>
PEFTKERN_INLINE void ask_for(const T* p) {
#pragma GCC unroll 4
  for (int i = 0; i < N; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(p + i, 0, LEVEL);
}

// The first vector of a pair.
template <class T>
PEFTKERN_INLINE vf first_of(const T* p) {
  return load(p);
}
PEFTKERN_INLINE vf first_of(const bf16* p) {
  const vu u = *reinterpret_cast<const vu_any*>(p) << 16;
  return reinterpret_cast<const vf&>(u);
}

// The second vector of a pair.
template <class T>
PEFTKERN_INLINE vf second_of(const T* p) {
  return load(p + W);
}
PEFTKERN_INLINE vf second_of(const bf16* p) {
  const vu u = *reinterpret_cast<const vu_any*>(p) & 0xffff0000u;
  return reinterpret_cast<const vf&>(u);
}

// kPair floats from their own order to that of a pair of T, in place.
template <class T>
PEFTKERN_INLINE void to_pair(float* p) {
  if (!std::is_same<T, bf16>::value) return;
  vi even{}, odd{};
  for (int i = 0; i < W; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  const vf x = load(p), y = load(p + W);
  store(p, __builtin_shuffle(x, y, even));
  store(p + W, __builtin_shuffle(x, y, odd));
}

// The inverse of to_pair.
template <class T>
PEFTKERN_INLINE void from_pair(vf& x, vf& y) {
  if (!std::is_same<T, bf16>::value) return;
  vi low{}, high{};
  for (int i = 0; i < W; ++i) {
    low[i] = (i & 1) * W + i / 2;
    high[i] = low[i] + W / 2;
  }
  const vf a = __builtin_shuffle(x, y, low), b = __builtin_shuffle(x, y, high);
  x = a, y = b;
}

// n < kPair elements in room for a pair, the rest zero.
template <class T>
struct Part {
  T of[kPair];
  Part(const T* p, int64_t n) {
    std::memset(of, 0, sizeof(of));
    std::memcpy(of, p, sizeof(T) * n);
  }
};

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
