// Host bodies of cuda/convert.h.
#pragma once

#include <cmath>
#include <cstring>

#include "sim/instructions/device.h"

namespace peftkern::cuda {

PEFTKERN_DEVICE float to_float(float x) {
  return x;
}

PEFTKERN_DEVICE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

PEFTKERN_DEVICE float to_float(f16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return x.bits >> 15 ? -size : size;
}

template <class T>
PEFTKERN_DEVICE T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline f16 from_float<f16>(float x) {
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  const float size = std::fabs(x);
  if (x != x) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size < 0x1p-14f) {  // subnormal: a multiple of 2^-24 (1024 of them make the smallest normal number)
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24))))};
  }
  int exponent;
  const float fraction = std::frexp(size, &exponent);                             // in [0.5, 1)
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(fraction, 11)));  // 1024 to 2048
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + steps - 1024))};
}

template <class T>
PEFTKERN_DEVICE uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

}  // namespace peftkern::cuda
