// multi_lora_linear on the CPU, a whole pass in one call:
//
//   y_t = g_b[a] * Base(x_t * p_b[a]) + s[a] g_d[a] * ((d[a] * ((drop(x_t) * p_d[a]) A[a]^T)) B[a]^T) +
//   beta[a]
//
// and its gradients; peftkern/ops/multi_lora_linear.py is the definition. Nothing is kept between calls but
// scratch, and nothing here chooses: who computes the base product is an argument.
#pragma once

#include "cpu/base/product.h"
#include "peftkern/cpu_multi.h"

namespace peftkern::cpu {

struct MultiLinear {
  ConstMatrix weight;                    // (N, K), any strides
  bool base = true;                      // false: the branch alone, without W
  const Quantised* quantised = nullptr;  // in the place of the weight's memory
  BaseKind kind = BaseKind::panels;
  Product vendor = nullptr;
  int threads = 1;
};

struct MultiLinearForward : MultiLinear {
  ConstMatrix x;       // (M, K), any strides
  ConstMatrix bias;    // a matrix of one row; null: none
  Matrix y;            // (M, N), columns adjacent; holds what the branch is added to if kind is given
  float* u = nullptr;  // (M, max_rank): null, or wanted
  Matrix h;            // (M, N), contiguous rows, like y: null, or wanted
};
void multi_linear_forward(const MultiBatch& batch, const MultiLinearForward& args);

// Every result may be null: not wanted. x is read for the gradients of A, p_b and p_d, u for those of B, d
// and g_d, h for g_b's, dx is written if p_b's is wanted.
struct MultiLinearBackward : MultiLinear {
  ConstMatrix dy, x, h;
  const float* u = nullptr;
  Matrix dx;  // contiguous rows
  float* dbias = nullptr;
  std::vector<void*> grads;          // one per tensor of weights, alike; null: not wanted
  std::vector<float*> vector_grads;  // the same of vectors, or none at all
};
void multi_linear_backward(const MultiBatch& batch, const MultiLinearBackward& args);

}  // namespace peftkern::cpu
