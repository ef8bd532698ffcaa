// Operands on their way from global memory to tensor cores, in registers throughout, for sgmv_cluster.cu and
// bottlenecks.
//
// Within a dot product the terms may come in any order, if both operands agree: lane t of a quad takes what
// lies together in memory, 8 columns of K or 4 ranks, as if it were what mma.h says the lane holds. Columns
// of the output come in any order too: lane g of the operand for 8 of them takes 8 that lie together, one for
// each of 8 products.
#pragma once

#include <type_traits>

#include "cuda/common/split.h"
#include "cuda/instructions/memory.h"

namespace peftkern::cuda {

struct alignas(16) Float4 {
  float value[4];
};
struct alignas(8) Vec8 {
  uint32_t word[2];
};

// How a half type T meets adapters of a type. Shrink: x times A. Expand: v, always two terms, times B.
template <class T, class Adapter>
struct Kind {
  static constexpr bool kNative = std::is_same_v<T, Adapter>;
  using Shrink = std::conditional_t<kNative, T, bf16>;
  static constexpr int kTermsX = !kNative && std::is_same_v<T, f16> ? 2 : 1;
  static constexpr int kTermsA = kNative ? 1 : 3;
  static constexpr int kTermsB = std::is_same_v<Adapter, bf16> ? 1 : 2;
};

// 8 adjacent values.
template <class E>
struct Eight {
  Vec16 words;
};
template <>
struct Eight<float> {
  Float4 half[2];
};

// Zeros from the value `left` on. Vector: p is aligned to 16 bytes, and left is a multiple of 8, or negative.
template <bool Vector, class E>
PEFTKERN_DEVICE Eight<E> load_eight(const E* p, int left) {
  Eight<E> v{};
  if constexpr (!Vector) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e >= left) continue;
      if constexpr (sizeof(E) == 4) {
        v.half[e / 4].value[e % 4] = p[e];
      } else {
        v.words.word[e / 2] |= static_cast<uint32_t>(p[e].bits) << 16 * (e % 2);
      }
    }
  } else if (left > 0) {
    if constexpr (sizeof(E) == 4) {
      v.half[0] = load_once(reinterpret_cast<const Float4*>(p));
      v.half[1] = load_once(reinterpret_cast<const Float4*>(p) + 1);
    } else {
      v.words = load_once(reinterpret_cast<const Vec16*>(p));
    }
  }
  return v;
}

template <class E>
PEFTKERN_DEVICE float value_of(const Eight<E>& v, int e) {
  if constexpr (sizeof(E) == 4) {
    return v.half[e / 4].value[e % 4];
  } else {
    const uint32_t word = v.words.word[e / 2];
    return e % 2 == 0 ? low_half<E>(word) : high_half<E>(word);
  }
}

// 8 adjacent values of a vector from p + n on, as many as are left; `other` if there is no vector, p null.
template <class E>
PEFTKERN_DEVICE void load_vector(float (&to)[8], const E* p, int n, int left, float other) {
  Eight<E> v{};
  if (p != nullptr) {
    const bool at_once = left >= 8 && reinterpret_cast<uintptr_t>(p + n) % 16 == 0;
    v = at_once ? load_eight<true>(p + n, left) : load_eight<false>(p + n, left);
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) to[e] = p != nullptr ? value_of(v, e) : other;
}

// Each value times a factor.
template <class E>
PEFTKERN_DEVICE Eight<float> times(const Eight<E>& v, const Eight<float>& factors) {
  Eight<float> product;
#pragma unroll
  for (int e = 0; e < 8; ++e) product.half[e / 4].value[e % 4] = value_of(v, e) * value_of(factors, e);
  return product;
}

// As words of two values of 16 bits, term by term.
template <class E, int Terms>
PEFTKERN_DEVICE void to_terms(const Eight<E>& v, uint32_t (&terms)[Terms][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t some[Terms];
    if constexpr (sizeof(E) == 4) {
      split<Terms>(v.half[i / 2].value[i % 2 * 2], v.half[i / 2].value[i % 2 * 2 + 1], some);
    } else if constexpr (Terms == 2) {
      split_f16(v.words.word[i], some);
    } else {
      some[0] = v.words.word[i];
    }
#pragma unroll
    for (int j = 0; j < Terms; ++j) terms[j][i] = some[j];
  }
}

// 16 ranks of B for 64 columns of out, a lane's part: ranks 4t to 4t + 3 of columns 8g to 8g + 7.
// Of halves, word[j][i] is ranks 2i and 2i + 1 of column j.
template <class E>
struct Square {
  uint32_t word[8][2];

  // One row per rank.
  PEFTKERN_DEVICE void load_rows(const E* p, int64_t stride, int ranks) {
    Eight<E> row[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) row[e] = load_eight<true>(p + e * stride, e < ranks ? 8 : 0);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t low = row[2 * i].words.word[j / 2], high = row[2 * i + 1].words.word[j / 2];
        word[j][i] = j % 2 == 0 ? (low & 0xffffu) | high << 16 : low >> 16 | (high & 0xffff0000u);
      }
    }
  }

  // One row per column.
  PEFTKERN_DEVICE void load_columns(const E* p, int64_t stride, int columns) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      Vec8 v{};
      if (j < columns) v = load_once(reinterpret_cast<const Vec8*>(p + j * stride));
      word[j][0] = v.word[0], word[j][1] = v.word[1];
    }
  }

  PEFTKERN_DEVICE void gather(const E* p, int64_t by_column, int64_t by_rank, int columns, int ranks) {
    // Not unrolled: it would take registers from everybody, and is rare.
#pragma unroll 1
    for (int column = 0; column < 8; ++column, p += by_column) {
      uint32_t some[2] = {};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (column < columns && e < ranks) {
          some[e / 2] |= static_cast<uint32_t>(p[e * by_rank].bits) << 16 * (e % 2);
        }
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j == column) word[j][0] = some[0], word[j][1] = some[1];
      }
    }
  }

  template <int Terms>
  PEFTKERN_DEVICE void column(int j, uint32_t (&terms)[Terms][2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t some[Terms];
      if constexpr (Terms == 2) {
        split_f16(word[j][i], some);
      } else {
        some[0] = word[j][i];
      }
#pragma unroll
      for (int k = 0; k < Terms; ++k) terms[k][i] = some[k];
    }
  }
};

template <>
struct Square<float> {
  float value[8][4];

  PEFTKERN_DEVICE void load_rows(const float* p, int64_t stride, int ranks) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Eight<float> row = load_eight<true>(p + e * stride, e < ranks ? 8 : 0);
#pragma unroll
      for (int j = 0; j < 8; ++j) value[j][e] = row.half[j / 4].value[j % 4];
    }
  }

  PEFTKERN_DEVICE void load_columns(const float* p, int64_t stride, int columns) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      Float4 v{};
      if (j < columns) v = load_once(reinterpret_cast<const Float4*>(p + j * stride));
#pragma unroll
      for (int e = 0; e < 4; ++e) value[j][e] = v.value[e];
    }
  }

  PEFTKERN_DEVICE void gather(const float* p, int64_t by_column, int64_t by_rank, int columns, int ranks) {
#pragma unroll 1
    for (int column = 0; column < 8; ++column, p += by_column) {
      float some[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) some[e] = column < columns && e < ranks ? p[e * by_rank] : 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) value[j][e] = j == column ? some[e] : value[j][e];
      }
    }
  }

  template <int Terms>
  PEFTKERN_DEVICE void column(int j, uint32_t (&terms)[Terms][2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t some[Terms];
      split<Terms>(value[j][2 * i], value[j][2 * i + 1], some);
#pragma unroll
      for (int k = 0; k < Terms; ++k) terms[k][i] = some[k];
    }
  }
};

// By the widest loads that the strides and the address allow; zeros from column `columns` and rank `ranks`
// on.
template <class E>
PEFTKERN_DEVICE Square<E> load_square(const E* p, int64_t by_column, int64_t by_rank, int columns,
                                      int ranks) {
  constexpr auto kBytes = static_cast<uintptr_t>(sizeof(E));
  const auto address = reinterpret_cast<uintptr_t>(p);
  Square<E> to{};
  if (by_column == 1 && columns >= 8 && (address | by_rank * kBytes) % 16 == 0) {
    to.load_rows(p, by_rank, ranks);
  } else if (by_rank == 1 && ranks >= 4 && (address | by_column * kBytes) % (4 * kBytes) == 0) {
    to.load_columns(p, by_column, columns);
  } else {
    to.gather(p, by_column, by_rank, columns, ranks);
  }
  return to;
}

}  // namespace peftkern::cuda
