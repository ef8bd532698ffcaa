// The passes over a bottleneck's M x R elements.
#pragma once

#include "cpu/bottleneck/bottleneck.h"

namespace peftkern::cpu {

// z = gate * f(t), then, if `ones`, a last column gate * 1. With a bias (R), it is added to t first, and
// `biased`, which may be t, gets the sum. t and z are contiguous; gate (M) may be null.
struct ActivateTask {
  Activation activation;
  int64_t M, R;
  const float *t, *bias;
  float* biased;
  const float* gate;
  float* z;
  bool ones;
  int threads;
};

// dt = gate * dv * f'(t), and dgate = rowdot(dv, f(t)), of a dv that goes with z: with `ones`, its last
// column is added to dgate. dt (M, R) and dgate (M) may be null.
struct SlopeTask {
  Activation activation;
  int64_t M, R;
  const float *t, *dv;
  bool ones;
  const float* gate;
  float *dt, *dgate;
  int threads;
};

}  // namespace peftkern::cpu
