// exp, tanh and the normal distribution of a vector, to a few units in the last place of fp32, and the
// activations made of them: f(t) and f'(t).
//
// The polynomials are least maximum fits on the intervals named with them. Special values come out as they do
// of libm: a NaN stays one, what overflows is infinite.
#pragma once

#include "cpu/bottleneck/bottleneck.h"
#include "cpu/common/simd.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// a where the mask is set, else b.
PEFTKERN_INLINE vf pick(vi mask, vf a, vf b) {
  const vi bits = (reinterpret_cast<const vi&>(a) & mask) | (reinterpret_cast<const vi&>(b) & ~mask);
  return reinterpret_cast<const vf&>(bits);
}
PEFTKERN_INLINE vf magnitude(vf x) {
  const vu bits = reinterpret_cast<const vu&>(x) & 0x7fffffffu;
  return reinterpret_cast<const vf&>(bits);
}
// x with the sign of `of`.
PEFTKERN_INLINE vf with_sign(vf x, vf of) {
  const vu bits =
      (reinterpret_cast<const vu&>(x) & 0x7fffffffu) | (reinterpret_cast<const vu&>(of) & 0x80000000u);
  return reinterpret_cast<const vf&>(bits);
}

// c[0] + c[1] x + ...
template <int N>
PEFTKERN_INLINE vf polynomial(vf x, const float (&c)[N]) {
  vf sum = splat(c[N - 1]);
#pragma GCC unroll 16
  for (int k = N - 2; k >= 0; --k) sum = fma(sum, x, splat(c[k]));
  return sum;
}

// 2^n e^r, |r| <= log(2) / 2, with log(2) in two parts, the first short enough that n times it is exact.
// Results below the normal range are 0.
PEFTKERN_INLINE vf exp_of(vf x) {
  constexpr float kLowest = -87.33f, kHighest = 88.37f;
  constexpr float kTail[] = {4.999999305049134e-01f, 1.6666514789120762e-01f, 4.16684568332672e-02f,
                             8.369419043289451e-03f, 1.3813142358131345e-03f};
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  constexpr float kShift = 12582912.0f;
  const vf shifted = fma(x, splat(1.44269504f), splat(kShift)), n = shifted - splat(kShift);
  const vf r = fma(n, splat(-3.19461849e-05f), fma(n, splat(-0x1.62ep-1f), x));
  const vf e = fma(r * r, polynomial(r, kTail), r) + splat(1.0f);
  const vu power = ((reinterpret_cast<const vu&>(shifted) - 0x4b400000u) + 127u) << 23;
  const vf y = e * reinterpret_cast<const vf&>(power);
  const vf not_less = pick(x < splat(kLowest), zero(), y);
  return pick(x > splat(kHighest), splat(__builtin_inff()), not_less);
}

PEFTKERN_INLINE vf sigmoid_of(vf x) {
  return splat(1.0f) / (splat(1.0f) + exp_of(-x));
}

// Near zero an odd polynomial, beyond by exp.
PEFTKERN_INLINE vf tanh_of(vf x) {
  constexpr float kNear = 0.625f;
  constexpr float kOdd[] = {-3.333325985e-01f, 1.333083037e-01f, -5.368802450e-02f, 2.046942354e-02f,
                            -5.515167223e-03f};
  const vf a = magnitude(x), square = x * x;
  const vf near = fma(x * square, polynomial(square, kOdd), x);
  const vf far = splat(1.0f) - splat(2.0f) / (exp_of(a + a) + splat(1.0f));
  return pick(a < splat(kNear), near, with_sign(far, x));
}

// The standard normal distribution: near zero 1/2 and an odd polynomial; beyond, the smaller tail is exp of a
// polynomial, so that it keeps its precision however small it is.
PEFTKERN_INLINE vf normal_of(vf x) {
  constexpr float kNear = 1.25f;
  constexpr float kOdd[] = {3.989422587e-01f,  -6.648998551e-02f, 9.971500845e-03f,
                            -1.182709696e-03f, 1.103275070e-04f,  -6.644870772e-06f};
  constexpr float kLogTail[] = {-6.932378361e-01f, -7.979459582e-01f, -3.174773832e-01f, -3.787594512e-02f,
                                6.204174750e-03f,  -7.518107971e-04f, 6.369325849e-05f,  -3.520306953e-06f,
                                1.130590278e-07f,  -1.591609622e-09f};
  const vf a = magnitude(x);
  const vf near = fma(x, polynomial(x * x, kOdd), splat(0.5f));
  const vf tail = exp_of(polynomial(a, kLogTail));
  return pick(a < splat(kNear), near, pick(x < zero(), tail, splat(1.0f) - tail));
}

// f(t) and f'(t); what is not used is not computed.
struct Point {
  vf value, slope;
};
template <Activation F>
PEFTKERN_INLINE Point activate(vf t) {
  const vf one = splat(1.0f);
  if constexpr (F == Activation::relu) {
    return {pick(t <= zero(), zero(), t), pick(t > zero(), one, zero())};
  } else if constexpr (F == Activation::leaky_relu) {
    const vf leak = splat(0.01f);
    return {pick(t > zero(), t, leak * t), pick(t > zero(), one, leak)};
  } else if constexpr (F == Activation::gelu) {
    const vf below = normal_of(t), density = splat(0.398942280f) * exp_of(splat(-0.5f) * t * t);
    return {t * below, fma(t, density, below)};
  } else if constexpr (F == Activation::gelu_tanh) {
    const vf scale = splat(0.797884561f), cube = splat(0.044715f), half = splat(0.5f), square = t * t;
    const vf h = tanh_of(scale * fma(cube * square, t, t)), share = fma(half, h, half);
    const vf inner = scale * fma(splat(3.0f) * cube, square, one);
    return {t * share, fma(half * t * (one - h * h), inner, share)};
  } else if constexpr (F == Activation::silu) {
    const vf s = sigmoid_of(t);
    return {t * s, s * fma(t, one - s, one)};
  } else if constexpr (F == Activation::tanh) {
    const vf h = tanh_of(t);
    return {h, one - h * h};
  } else if constexpr (F == Activation::sigmoid) {
    const vf s = sigmoid_of(t);
    return {s, s * (one - s)};
  } else {
    return {t, one};
  }
}

// run(constant): with the activation as a type.
template <Activation F>
struct Constant {
  static constexpr Activation value = F;
};
template <class Run>
static void with_activation(Activation activation, const Run& run) {
  switch (activation) {
    case Activation::identity:
      return run(Constant<Activation::identity>{});
    case Activation::relu:
      return run(Constant<Activation::relu>{});
    case Activation::leaky_relu:
      return run(Constant<Activation::leaky_relu>{});
    case Activation::gelu:
      return run(Constant<Activation::gelu>{});
    case Activation::gelu_tanh:
      return run(Constant<Activation::gelu_tanh>{});
    case Activation::silu:
      return run(Constant<Activation::silu>{});
    case Activation::tanh:
      return run(Constant<Activation::tanh>{});
    case Activation::sigmoid:
      return run(Constant<Activation::sigmoid>{});
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
