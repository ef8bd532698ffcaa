// A frozen weight in codes of 4 or 8 bits, as memory: the kinds of peftkern/bases that are not dense, in one
// description, so that what reads W knows no library.
//
//   W[n, k] = (value(code[n, k]) - zero[g]) * scale[g],   g the group of codes that share a scale
#pragma once

#include "peftkern/types.h"

namespace peftkern {

struct Quantised {
  // What a code stands for.
  enum class Code : int { nf4, fp4, e2m1, uint4, int4, minus8, int8, e4m3, e5m2 };
  // Where the code at position p = n * row + k lies. Of 4 bits: two neighbours in a byte; or p and p + half,
  // where half are all of W (`halves`) or 16 of a block of 32 (`blocks`), the first of which is in the upper
  // or the lower bits, as said.
  enum class Order : int { upper_first, lower_first, halves_upper, halves_lower, blocks_lower, bytes };
  // Of a scale, and of a zero. `nested`: a code of 8 bits for one. e8m0: a power of two.
  enum class Number : int { f32, bf16, f16, e8m0, nested };

  Code code = Code::nf4;
  Order order = Order::upper_first;
  int64_t N = 0, K = 0;
  const uint8_t* codes = nullptr;
  int64_t row = 0;  // positions from a row of W to the next
  // Whether W meets rows that are rounded to 8 bits, by products of integers alone (kind w8a8).
  bool integers = false;
  // Bytes of a block that begins with the scale of its 32 codes, which `codes` and `scales` point into; 0:
  // codes lie one after the other, and so do scales.
  int64_t block_bytes = 0;

  // The group of (n, k): p / group if flat, else n / rows * groups + k / group.
  bool flat = false;
  int64_t group = 1, rows = 1, groups = 1;
  Number number = Number::f32;
  const void* scales = nullptr;
  const void* zeros = nullptr;  // null: all are zero

  // nested: scale g is book[scales[g]] * outer[g / outer_group] + offset.
  const float* book = nullptr;
  const float* outer = nullptr;
  int64_t outer_group = 1;
  const float* offset = nullptr;
};

}  // namespace peftkern
