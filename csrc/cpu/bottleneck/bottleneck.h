// A bottleneck adapter on the CPU, a whole pass in one call:
//
//   y = residual + g * drop_out(s c * (z U^T + b_up)),     z = f(t),  t = drop_in(h) D^T + b_down
//
// and its gradients; peftkern/ops/bottleneck_adapter.py is the definition. Between calls nothing is kept but
// scratch; of M x N or M x K nothing is made but results.
#pragma once

#include "peftkern/types.h"

namespace peftkern::cpu {

// f, in the order of peftkern/activations.py.
enum class Activation : int { identity, relu, leaky_relu, gelu, gelu_tanh, silu, tanh, sigmoid };
constexpr int kActivations = 8;
// Multiply-adds that an element of one counts for.
constexpr int64_t kActivationWork = 32;

// down D (R, K), up U (N, R), any strides. A vector is a matrix of one row, absent if its data is null.
// up_bias (N), gate (M), out_scale (N). Dropout acts on one side at most; kept: 1 / (1 - p) there, else 1.
struct Bottleneck {
  int64_t M = 0, N = 0, K = 0, R = 0;
  ConstMatrix down, up, up_bias, gate, out_scale;
  Activation activation = Activation::identity;
  float scaling = 1.0f;
  Dropout drop_in, drop_out;
  float kept_in = 1.0f, kept_out = 1.0f;
  // By products of bf16, where h and the matrices are and there is no gate; else by the register kernels of the
  // low-rank branch, in fp32.
  bool pairs = false;
  int threads = 1;
};

// h (M, K), residual (M, N) in h's dtype, down_bias (R), any strides. y has contiguous rows; t (M, R), null:
// not wanted.
struct BottleneckForward : Bottleneck {
  ConstMatrix h, residual, down_bias;
  Matrix y;
  float* t = nullptr;
};
void bottleneck_forward(const BottleneckForward& args);

// Every result may be null: not wanted. h is read for ddown, down for dh, up for all but dup and dup_bias,
// up_bias for dgate and dout_scale. through: dh includes dy.
struct BottleneckBackward : Bottleneck {
  ConstMatrix dy, h;
  const float* t = nullptr;
  bool through = false;
  Matrix dh, ddown, dup;  // contiguous
  float *ddown_bias = nullptr, *dup_bias = nullptr, *dgate = nullptr, *dout_scale = nullptr;
};
void bottleneck_backward(const BottleneckBackward& args);

}  // namespace peftkern::cpu
