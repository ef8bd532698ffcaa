// What lies between the two products of a bottleneck, elementwise over M x R: task.h says what.
#include "cpu/bottleneck/functions.h"
#include "cpu/bottleneck/task.h"
#include "cpu/common/micro.h"
#include "cpu/common/thread.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

// body(c, n) for pieces of a row, n of them W columns wide, the last what is left.
template <class Body>
PEFTKERN_INLINE void pieces(int64_t columns, const Body& body) {
  int64_t c = 0;
  for (; c + W <= columns; c += W) body(c, W);
  if (c < columns) body(c, static_cast<int>(columns - c));
}
PEFTKERN_INLINE vf part(const float* p, int n) {
  return n == W ? load(p) : load_n(p, n);
}
PEFTKERN_INLINE void set(float* p, vf x, int n) {
  if (n == W) {
    store(p, x);
  } else {
    store_n(p, x, n);
  }
}

template <Activation F>
void values(const ActivateTask& a) {
  const int64_t ldt = a.rows != nullptr ? a.ld : a.R, ldz = a.rows != nullptr ? a.ld : a.R + a.ones;
  parallel(a.threads, [&] {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.M; ++i) {
      const int64_t row = a.rows != nullptr ? a.rows[i] : i;
      float* z = a.z + row * ldz;
      const float gate = a.gate != nullptr ? a.gate[i] : 1.0f;
      pieces(a.R, [&](int64_t c, int n) {
        vf x = part(a.t + row * ldt + c, n);
        if (a.bias != nullptr) x += part(a.bias + c, n);
        if (a.bias != nullptr && a.biased != nullptr) set(a.biased + row * ldt + c, x, n);
        set(z + c, splat(gate) * activate<F>(x).value, n);
      });
      if (a.ones) z[a.R] = gate;
    }
  });
}

template <Activation F>
void slopes(const SlopeTask& a) {
  const int64_t ldt = a.rows != nullptr ? a.ld : a.R, ld = a.rows != nullptr ? a.ld : a.R + a.ones;
  parallel(a.threads, [&] {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.M; ++i) {
      const int64_t row = a.rows != nullptr ? a.rows[i] : i;
      const float *t = a.t + row * ldt, *dv = a.dv + row * ld;
      const float gate = a.gate != nullptr ? a.gate[i] : 1.0f;
      vf sum = zero();
      pieces(a.R, [&](int64_t c, int n) {
        const vf d = splat(a.alpha) * part(dv + c, n);
        const vf x = part(t + c, n);
        const Point f = activate<F>(a.bias != nullptr ? x + part(a.bias + c, n) : x);
        if (a.dgate != nullptr) sum = fma(d, f.value, sum);
        if (a.dt != nullptr) set(a.dt + row * ldt + c, splat(gate) * d * f.slope, n);
      });
      if (a.dgate == nullptr) continue;
      a.dgate[i] = a.ones ? dv[a.R] : 0.0f;
      add_lane_sums(sum, zero(), zero(), zero(), 1, a.dgate + i);
    }
  });
}

// run(constant): with the activation as a type.
template <Activation F>
struct Constant {
  static constexpr Activation value = F;
};
template <class Run>
void with(Activation activation, const Run& run) {
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

}  // namespace

void activate_run(const ActivateTask& a) {
  with(a.activation, [&](auto f) { values<decltype(f)::value>(a); });
}

void slope_run(const SlopeTask& a) {
  with(a.activation, [&](auto f) { slopes<decltype(f)::value>(a); });
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
