// The passes over a bottleneck's M x R elements.
#pragma once

#include "cpu/bottleneck/bottleneck.h"

namespace peftkern::cpu {

// z = gate * f(t), then, if `ones`, a last column gate * 1. With a bias (R), it is added to t first, and
// `biased`, which may be t or null, gets the sum. gate (M) may be null. t and z are contiguous; with `rows`,
// row i is row rows[i] of both, and rows are `ld` apart.
struct ActivateTask {
  Activation activation;
  int64_t M, R;
  const float *t, *bias;
  float* biased;
  const float* gate;
  float* z;
  bool ones;
  int threads;
  const int32_t* rows = nullptr;
  int64_t ld = 0;
};
void activate_run(const ActivateTask& task);

// dt = gate * dv * f'(t), and dgate = rowdot(dv, f(t)), of a dv that goes with z: with `ones`, its last
// column is added to dgate. dt (M, R), which may be dv, and dgate (M) may be null. `bias`, `rows` and `ld` as
// above, of t, dv and dt.
struct SlopeTask {
  Activation activation;
  int64_t M, R;
  const float *t, *dv;
  bool ones;
  const float* gate;
  float *dt, *dgate;
  int threads;
  const float* bias = nullptr;
  const int32_t* rows = nullptr;
  int64_t ld = 0;
  float alpha = 1.0f;  // of dv
};
void slope_run(const SlopeTask& task);

// out = to + drop(alpha * scale * delta + bias), out and `to` (M, C) in bf16, delta in fp32 or bf16, vectors
// (C) in fp32; to, scale and bias may be absent. Columns are adjacent.
struct AddTask {
  Matrix out;
  ConstMatrix to, delta;
  int64_t M, C;
  float alpha;
  const float *scale, *bias;
  Dropout dropout;
  int threads;
};
void add_run(const AddTask& task);

}  // namespace peftkern::cpu
