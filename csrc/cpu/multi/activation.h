// Activations by code, in the order of peftkern/activations.py: value and slope at t.
#pragma once

#include <cmath>

namespace peftkern::cpu {

constexpr int kActivations = 8;

inline float activation_value(int code, float t) {
  switch (code) {
    case 1:
      return t > 0.0f ? t : 0.0f;
    case 2:
      return t > 0.0f ? t : 0.01f * t;
    case 3:
      return 0.5f * t * (1.0f + std::erf(t * 0.70710678f));
    case 4:
      return 0.5f * t * (1.0f + std::tanh(0.79788456f * (t + 0.044715f * t * t * t)));
    case 5:
      return t / (1.0f + std::exp(-t));
    case 6:
      return std::tanh(t);
    case 7:
      return 1.0f / (1.0f + std::exp(-t));
    default:
      return t;
  }
}

inline float activation_slope(int code, float t) {
  switch (code) {
    case 1:
      return t > 0.0f ? 1.0f : 0.0f;
    case 2:
      return t > 0.0f ? 1.0f : 0.01f;
    case 3:
      return 0.5f * (1.0f + std::erf(t * 0.70710678f)) + t * 0.39894228f * std::exp(-0.5f * t * t);
    case 4: {
      const float h = std::tanh(0.79788456f * (t + 0.044715f * t * t * t));
      return 0.5f * (1.0f + h) + 0.5f * t * (1.0f - h * h) * 0.79788456f * (1.0f + 3.0f * 0.044715f * t * t);
    }
    case 5: {
      const float s = 1.0f / (1.0f + std::exp(-t));
      return s * (1.0f + t * (1.0f - s));
    }
    case 6: {
      const float h = std::tanh(t);
      return 1.0f - h * h;
    }
    case 7: {
      const float s = 1.0f / (1.0f + std::exp(-t));
      return s * (1.0f - s);
    }
    default:
      return 1.0f;
  }
}

}  // namespace peftkern::cpu
