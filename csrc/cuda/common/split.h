// Wide values as sums of bf16 terms, each the rounding of what is left: tensor cores multiply the terms, so
// an adapter in fp32 meets a half-precision tile without loss. Three terms hold every bit of an fp32 value,
// two hold 16; an fp16 value is exactly two. fp16 terms are never used: lora_B is tiny early in training and
// would fall below their range.
//
// Of the products a_i b_j those with i + j below the larger number of terms are kept, smallest first.
#pragma once

#include "cuda/instructions/convert.h"

namespace peftkern::cuda {

// The lower and the upper value of a word.
template <class T>
PEFTKERN_DEVICE float low_half(uint32_t word) {
  T value;
  value.bits = static_cast<uint16_t>(word);
  return to_float(value);
}
template <class T>
PEFTKERN_DEVICE float high_half(uint32_t word) {
  T value;
  value.bits = static_cast<uint16_t>(word >> 16);
  return to_float(value);
}

// terms[i] packs term i of both values, low in bits 0 to 15.
template <int Terms>
PEFTKERN_DEVICE void split(float low, float high, uint32_t (&terms)[Terms]) {
#pragma unroll
  for (int i = 0; i < Terms; ++i) {
    terms[i] = pack<bf16>(low, high);
    if (i + 1 < Terms) {
      low -= low_half<bf16>(terms[i]);
      high -= high_half<bf16>(terms[i]);
    }
  }
}

// A word of two fp16 values.
PEFTKERN_DEVICE void split_f16(uint32_t word, uint32_t (&terms)[2]) {
  split<2>(low_half<f16>(word), high_half<f16>(word), terms);
}

}  // namespace peftkern::cuda
