// The loader of a base in codes (peftkern/quantised.h): runs of adjacent codes of a row as 16 bytes, and what
// they stand for, in fp32.
//
// Codes of 4 bits are looked up in shared memory, where every lane has a table of its own: its entries lie in
// the lane's bank, so that no two lanes meet. Codes of 8 bits are integers, whose row has one scale: that is
// the caller's.
#pragma once

#include "cuda/common/vector.h"
#include "cuda/instructions/memory.h"
#include "cuda/instructions/warp.h"
#include "peftkern/quantised.h"

namespace peftkern::cuda {

// A weight as kernels take it. values: of codes of 4 bits. The sizes of groups of a flat weight, and of outer
// groups, are powers of two.
struct Codes {
  Quantised w;
  float values[16];
  int group_shift, outer_shift;

  PEFTKERN_DEVICE bool nested() const { return w.number == Quantised::Number::nested; }
  // The group of (n, k).
  PEFTKERN_DEVICE int64_t group_at(int64_t n, int k) const {
    if (w.flat) return (n * w.row + k) >> group_shift;
    return n * w.groups + static_cast<uint32_t>(k) / static_cast<uint32_t>(w.group);
  }
};

// How codes lie and what belongs to them: an instance for each that the kernels know.
template <int Bits, bool Affine>
struct Layout {
  static constexpr int kBits = Bits;
  static constexpr bool kAffine = Affine;  // zeros, and scales of any type
  static constexpr int kRun = 128 / Bits;  // codes of 16 bytes
};
using Codebook4 = Layout<4, false>;  // nf4, fp4: scales in fp32, or nested
using Affine4 = Layout<4, true>;     // int4
using Bytes = Layout<8, false>;      // int8

// In a block's shared memory, for codes of 4 bits.
struct Tables {
  float values[16][32];
  float book[256];  // of nested scales

  // By all threads, before a barrier.
  PEFTKERN_DEVICE void fill(const Codes& codes) {
    const int threads = static_cast<int>(blockDim.x);
    for (int i = static_cast<int>(threadIdx.x); i < 16 * 32; i += threads) {
      values[i / 32][i % 32] = codes.values[i / 32];
    }
    if (!codes.nested()) return;
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += threads) book[i] = codes.w.book[i];
  }
};

PEFTKERN_DEVICE float number_of(Quantised::Number type, const void* data, int64_t i) {
  const DType dtype = type == Quantised::Number::bf16  ? DType::bf16
                      : type == Quantised::Number::f16 ? DType::f16
                                                       : DType::f32;
  return element_of({data, dtype}, i);
}

// Of int8: the scale of a row.
PEFTKERN_DEVICE float row_scale(const Codes& codes, int64_t n) {
  return number_of(codes.w.number, codes.w.scales, n);
}

// What belongs to a group, as it lies in memory: a scale that is a code waits for its value until it is used.
template <class L>
struct Group {
  float scale = 0;  // of the outer group if nested
  float zero = 0;
  int code = 0;

  PEFTKERN_DEVICE void load(const Codes& codes, int64_t g) {
    const Quantised& w = codes.w;
    if constexpr (L::kAffine) {
      scale = number_of(w.number, w.scales, g);
      zero = number_of(w.number, w.zeros, g);
    } else if (codes.nested()) {
      code = static_cast<const uint8_t*>(w.scales)[g];
      scale = w.outer[g >> codes.outer_shift];
    } else {
      scale = static_cast<const float*>(w.scales)[g];
    }
  }
  PEFTKERN_DEVICE float scale_of(const Codes& codes, const Tables& tables) const {
    return !L::kAffine && codes.nested() ? tables.book[code] * scale + *codes.w.offset : scale;
  }
};

// Codes k to k + kRun - 1 of row n, and their values, eight at a time. Zeros from column K on.
//
// Whole: K, rows and groups are multiples of kRun codes and begin at 16 bytes.
template <class L, bool Whole>
struct Run {
  Vec16 words;
  Group<L> group;

  PEFTKERN_DEVICE void load(const Codes& codes, int64_t n, int k) {
    words = {};
    group = {};
    if (k >= codes.w.K) return;
    words = load_once(reinterpret_cast<const Vec16*>(codes.w.codes + (n * codes.w.row + k) * L::kBits / 8));
    if constexpr (L::kBits == 4) group.load(codes, codes.group_at(n, k));
  }

  PEFTKERN_DEVICE void decode(const Codes& codes, const Tables& tables, int i, float (&values)[8]) const {
    if constexpr (L::kBits == 8) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        values[e] = static_cast<float>(static_cast<int8_t>(words.word[2 * i + e / 4] >> 8 * (e % 4)));
      }
    } else {
      uint32_t word = words.word[i];
      if (codes.w.order == Quantised::Order::upper_first) {
        word = (word >> 4 & 0x0f0f0f0fu) | (word & 0x0f0f0f0fu) << 4;
      }
      const float* own = &tables.values[0][lane_index()];
      const float scale = group.scale_of(codes, tables);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float value = own[(word >> 4 * e & 15u) * 32];
        values[e] = (L::kAffine ? value - group.zero : value) * scale;
      }
    }
  }
};

// Otherwise codes are read one by one as they are used, and a run may have several groups.
template <class L>
struct Run<L, false> {
  int64_t n;
  int k;

  PEFTKERN_DEVICE void load(const Codes&, int64_t row, int column) { n = row, k = column; }

  PEFTKERN_DEVICE void decode(const Codes& codes, const Tables& tables, int i, float (&values)[8]) const {
    const Quantised& w = codes.w;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int column = k + 8 * i + e;
      const int64_t at = n * w.row + column;
      values[e] = 0;
      if (column >= w.K) continue;
      if constexpr (L::kBits == 8) {
        values[e] = static_cast<float>(static_cast<int8_t>(w.codes[at]));
      } else {
        Group<L> group;
        group.load(codes, codes.group_at(n, column));
        const int shift = (at % 2 == 0) == (w.order == Quantised::Order::upper_first) ? 4 : 0;
        const float value = tables.values[w.codes[at / 2] >> shift & 15][lane_index()];
        values[e] = (value - group.zero) * group.scale_of(codes, tables);
      }
    }
  }
};

}  // namespace peftkern::cuda
