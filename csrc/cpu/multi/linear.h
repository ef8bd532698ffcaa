// multi_lora_linear on the CPU, a whole pass in one call:
//
//   y_t = W x_t + s[a_t] B[a_t] A[a_t] drop(x_t) + bias
//
// and its gradients; peftkern/ops/multi_lora_linear.py is the definition. Nothing is kept between calls but
// scratch, and nothing here chooses: who computes the base product is an argument.
#pragma once

#include "cpu/base/product.h"
#include "peftkern/cpu_multi.h"

namespace peftkern::cpu {

struct MultiLinear {
  ConstMatrix weight;  // (N, K), any strides
  bool base = true;    // false: the branch alone, without W
  BaseKind kind = BaseKind::panels;
  Product vendor = nullptr;
  int threads = 1;
};

struct MultiLinearForward : MultiLinear {
  ConstMatrix x;       // (M, K), any strides
  ConstMatrix bias;    // a matrix of one row; null: none
  Matrix y;            // (M, N), columns adjacent; holds what the branch is added to if kind is given
  float* u = nullptr;  // (M, max_rank): null, or wanted
};
void multi_linear_forward(const MultiBatch& batch, const MultiLinearForward& args);

// Every result may be null: not wanted. x is read for the gradients of A, u for those of B.
struct MultiLinearBackward : MultiLinear {
  ConstMatrix dy, x;
  const float* u = nullptr;
  Matrix dx;  // contiguous rows
  float* dbias = nullptr;
  std::vector<void*> grads;  // one per tensor of weights, alike; null: not wanted
};
void multi_linear_backward(const MultiBatch& batch, const MultiLinearBackward& args);

}  // namespace peftkern::cpu
