// The activations of a bottleneck and their slopes, of one fp32 value. No slope is a difference from one.
#pragma once

#include <cmath>

#include "cuda/instructions/device.h"
#include "peftkern/types.h"

namespace peftkern::cuda {

constexpr float kLeak = 0.01f;
constexpr float kGeluScale = 0.7978845608028654f, kGeluCube = 0.044715f;          // sqrt(2 / pi)
constexpr float kRootHalf = 0.7071067811865476f, kDensity = 0.3989422804014327f;  // 1 / sqrt(2 pi)

// The sigmoid and its slope.
struct Bell {
  float value, slope;
};
PEFTKERN_DEVICE Bell sigmoid(float t) {
  const float e = expf(-fabsf(t)), low = 1.0f / (1.0f + e);
  return {t < 0.0f ? e * low : low, e * low * low};
}
// (1 + tanh(u)) / 2 is the sigmoid of 2 u.
PEFTKERN_DEVICE Bell gelu_share(float t) {
  return sigmoid(2.0f * kGeluScale * (t + kGeluCube * t * t * t));
}

// f(t). NaN stays.
PEFTKERN_DEVICE float activate(Activation f, float t) {
  switch (f) {
    case Activation::relu:
      return t < 0.0f ? 0.0f : t;
    case Activation::leaky_relu:
      return t < 0.0f ? kLeak * t : t;
    case Activation::gelu:
      return 0.5f * t * (1.0f + erff(t * kRootHalf));
    case Activation::gelu_tanh:
      return t * gelu_share(t).value;
    case Activation::silu:
      return t * sigmoid(t).value;
    case Activation::tanh:
      return tanhf(t);
    case Activation::sigmoid:
      return sigmoid(t).value;
    default:
      return t;
  }
}

// f'(t).
PEFTKERN_DEVICE float slope(Activation f, float t) {
  Bell s;
  switch (f) {
    case Activation::relu:
      return t > 0.0f ? 1.0f : 0.0f;
    case Activation::leaky_relu:
      return t > 0.0f ? 1.0f : kLeak;
    case Activation::gelu:
      return 0.5f * (1.0f + erff(t * kRootHalf)) + t * kDensity * expf(-0.5f * t * t);
    case Activation::gelu_tanh:
      s = gelu_share(t);
      return s.value + 2.0f * kGeluScale * t * s.slope * (1.0f + 3.0f * kGeluCube * t * t);
    case Activation::silu:
      s = sigmoid(t);
      return s.value + t * s.slope;
    case Activation::tanh:
      return 4.0f * sigmoid(2.0f * t).slope;
    case Activation::sigmoid:
      return sigmoid(t).slope;
    default:
      return 1.0f;
  }
}

}  // namespace peftkern::cuda
