// What happens to a tile's sums in registers: masks, scales, bias, and the way to memory.
#pragma once

#include "cuda/instructions/convert.h"
#include "cuda/instructions/warp.h"
#include "cuda/lora_linear/sm90_plan.h"

namespace peftkern::cuda::hopper {

// Register i of a lane is row l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2 of its warp's 16
// rows.

template <class T>
PEFTKERN_DEVICE float load_bias(const LoraLinearArgs& args, int column) {
  return args.bias_dtype == DType::f32 ? static_cast<const float*>(args.bias)[column]
                                       : to_float(static_cast<const T*>(args.bias)[column]);
}

// Zeroes what dropout drops. mask: a byte for 8 columns, from the warp's first row on.
template <int Columns>
PEFTKERN_DEVICE void apply_mask(float (&sums)[Columns / 2], const unsigned char* mask, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto* row = reinterpret_cast<const Vec16*>(mask + (lane / 4 + 8 * half) * (Columns / 8));
#pragma unroll
    for (int vector = 0; vector < Columns / 128; ++vector) {
      const Vec16 bits = row[vector];
#pragma unroll
      for (int group = 0; group < 16; ++group) {
        const uint32_t mine = bits.word[group / 4] >> lane % 4 * 2;
        float* pair = sums + (16 * vector + group) * 4 + 2 * half;
        if ((mine >> group % 4 * 8 & 1) == 0) pair[0] = 0;
        if ((mine >> group % 4 * 8 & 2) == 0) pair[1] = 0;
      }
    }
  }
}

template <int Columns>
PEFTKERN_DEVICE void multiply_columns(float (&sums)[Columns / 2], const float* scale, int lane) {
#pragma unroll
  for (int group = 0; group < Columns / 8; ++group) {
    const float s0 = scale[group * 8 + lane % 4 * 2], s1 = scale[group * 8 + lane % 4 * 2 + 1];
    sums[4 * group] *= s0;
    sums[4 * group + 1] *= s1;
    sums[4 * group + 2] *= s0;
    sums[4 * group + 3] *= s1;
  }
}

template <int Columns>
PEFTKERN_DEVICE void add_columns(float (&sums)[Columns / 2], const float* bias, int lane) {
#pragma unroll
  for (int group = 0; group < Columns / 8; ++group) {
    const float b0 = bias[group * 8 + lane % 4 * 2], b1 = bias[group * 8 + lane % 4 * 2 + 1];
    sums[4 * group] += b0;
    sums[4 * group + 1] += b1;
    sums[4 * group + 2] += b0;
    sums[4 * group + 3] += b1;
  }
}

// Four lanes exchange their four words each: lane t gets word t of each, in the order of the lanes.
PEFTKERN_DEVICE void transpose_quad(uint32_t (&word)[4], int lane) {
  const bool odd = (lane & 1) != 0, upper = (lane & 2) != 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = shuffle_xor(odd ? word[i] : word[i + 1], 1);
    if (odd) word[i] = got;
    if (!odd) word[i + 1] = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = shuffle_xor(upper ? word[i] : word[i + 2], 2);
    if (upper) word[i] = got;
    if (!upper) word[i + 2] = got;
  }
}

// Rounds the sums and stores them. row, column: of the warp's first element. Inside: all of its elements are
// in the matrix, and 16 bytes of a row can be stored at a time.
template <class T, int Columns, bool Inside>
PEFTKERN_DEVICE void store_rows(const LoraLinearArgs& args, const float (&sums)[Columns / 2], int64_t row,
                                int column, int lane) {
  T* start = static_cast<T*>(args.out.data) + (row + lane / 4) * args.out.row + column + lane % 4 * 8;
  const int columns = static_cast<int>(args.N) - column - lane % 4 * 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int left = row + lane / 4 + 8 * half < args.M ? columns : 0;
    if (half == 1) start += 8 * args.out.row;
#pragma unroll
    for (int group = 0; group < Columns / 8; group += 4) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = sums + (group + i) * 4 + 2 * half;
        word[i] = pack<T>(pair[0], pair[1]);
      }
      transpose_quad(word, lane);
      T* const to = start + group * 8;
      if constexpr (Inside) {
        Vec16 value;
#pragma unroll
        for (int i = 0; i < 4; ++i) value.word[i] = word[i];
        *reinterpret_cast<Vec16*>(to) = value;
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (group * 8 + e < left) to[e].bits = static_cast<uint16_t>(word[e / 2] >> 16 * (e % 2));
        }
      }
    }
  }
}

template <class T, int Columns>
PEFTKERN_DEVICE void store_sums(const LoraLinearArgs& args, const float (&sums)[Columns / 2], int64_t row,
                                int column, int lane) {
  const bool aligned = reinterpret_cast<uintptr_t>(args.out.data) % 16 == 0 && args.out.row % 8 == 0;
  // The same in all lanes, as the vote tells the compiler.
  if (vote_all(aligned && row + 16 <= args.M && column + Columns <= args.N)) {
    store_rows<T, Columns, true>(args, sums, row, column, lane);
  } else {
    store_rows<T, Columns, false>(args, sums, row, column, lane);
  }
}

}  // namespace peftkern::cuda::hopper
