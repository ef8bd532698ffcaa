// What codes of 4 bits stand for, on every device.
#pragma once

#include "peftkern/quantised.h"

namespace peftkern {

// The values of codes of 4 bits. NF4: quantiles of the normal distribution (QLoRA, arXiv 2305.14314); FP4:
// bitsandbytes' sign, 2 bits of exponent, 1 of mantissa over 12; E2M1: as the OCP microscaling formats have
// it.
constexpr float kNf4[16] = {-1.0f,
                            -0.6961928009986877f,
                            -0.5250730514526367f,
                            -0.39491748809814453f,
                            -0.28444138169288635f,
                            -0.18477343022823334f,
                            -0.09105003625154495f,
                            0.0f,
                            0.07958029955625534f,
                            0.16093020141124725f,
                            0.24611230194568634f,
                            0.33791524171829224f,
                            0.44070982933044434f,
                            0.5626170039176941f,
                            0.7229568362236023f,
                            1.0f};
constexpr float kFp4[16] = {0.0f,
                            0.0052083333395421505f,
                            0.6666666865348816f,
                            1.0f,
                            0.3333333432674408f,
                            0.5f,
                            0.1666666716337204f,
                            0.25f,
                            0.0f,
                            -0.0052083333395421505f,
                            -0.6666666865348816f,
                            -1.0f,
                            -0.3333333432674408f,
                            -0.5f,
                            -0.1666666716337204f,
                            -0.25f};
constexpr float kE2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                             -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
constexpr float kUint4[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
// Two's complement.
constexpr float kInt4[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
constexpr float kMinus8[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

// Of codes of 8 bits, which are no index of values, any. Static: of several levels' copies a linker would
// keep one.
static inline const float* values_of(Quantised::Code code) {
  switch (code) {
    case Quantised::Code::fp4:
      return kFp4;
    case Quantised::Code::e2m1:
      return kE2m1;
    case Quantised::Code::uint4:
      return kUint4;
    case Quantised::Code::int4:
      return kInt4;
    case Quantised::Code::minus8:
      return kMinus8;
    default:
      return kNf4;
  }
}

}  // namespace peftkern
