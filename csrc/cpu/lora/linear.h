// lora_linear on the CPU, a whole pass in one call:
//
//   y = g_b * ((x * p_b) W^T) + s g_d * ((d * u) B^T) + bias,        u = (drop(x) * p_d) A^T
//
// and its gradients; peftkern/ops/lora_linear.py is the definition. Nothing is kept between calls but
// scratch, and nothing here chooses: who computes the base product is an argument.
#pragma once

#include "cpu/base/product.h"

namespace peftkern::cpu {

// x (M, K), weight (N, K), A (R, K), B (N, R), any strides. A vector is a matrix of one row, absent if its
// data is null.
// d (R), p_b (K), p_d (K), g_b (N), g_d (N).
struct LoraLinear {
  int64_t M = 0, N = 0, K = 0, R = 0;
  ConstMatrix x, weight, A, B;
  float scaling = 1.0f;
  Dropout dropout;
  float kept_scale = 1.0f;  // 1 / (1 - p)
  ConstMatrix d, p_b, p_d, g_b, g_d;
  const Quantised* quantised = nullptr;  // in the place of the weight's memory
  BaseKind kind = BaseKind::panels;
  bool pairs = false;  // the branch by products of bf16 (pairs.h): all bf16, and no d, p_d, g_d
  Product vendor = nullptr;
  int threads = 1;
};

struct LoraLinearForward : LoraLinear {
  ConstMatrix bias;
  Matrix y;            // contiguous rows; holds the product already if kind is given and h is not wanted
  Matrix h;            // the base product, in y's dtype: null, or wanted
  float* u = nullptr;  // (M, R): null, or wanted
};
void lora_linear_forward(const LoraLinearForward& args);

// Every result may be null: not wanted. x is read for dA, dp_d and dp_b, h for dg_b, u for dB,
// dd and dg_d.
struct LoraLinearBackward : LoraLinear {
  ConstMatrix dy, h;
  const float* u = nullptr;
  Matrix dx;  // contiguous rows; wanted with dp_b
  Matrix dA, dB;
  float *dbias = nullptr, *dd = nullptr, *dp_b = nullptr, *dp_d = nullptr, *dg_b = nullptr, *dg_d = nullptr;
};
void lora_linear_backward(const LoraLinearBackward& args);

}  // namespace peftkern::cpu
