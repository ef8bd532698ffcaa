// lora_linear on a GPU, a whole pass in one call:
//
//   y = g_b * (x W^T) + s g_d * ((d * u) B^T) + bias,        u = (drop(x) * p_d) A^T
//
// and its gradients; peftkern/ops/lora_linear.py is the definition. A pass says what memory it needs beside
// its results, is given it, and starts its kernels; the functions return as those of peftkern/cuda.h do.
#pragma once

#include "peftkern/cuda.h"

namespace peftkern::cuda {

// x and dy have adjacent columns, w (N, K) adjacent columns or adjacent rows, results no gaps; a (R, K) and
// b (N, R) have any strides. Vectors are fp32, absent if null.
struct LoraPass {
  int64_t M, N, K, R;
  ConstMatrix w, a, b;
  float scaling;
  Scales<const float*> scales;
  DeviceDropout dropout;
  int arch;  // compute capability of the device: 80, 90, 100
  int multiprocessors;
  void* stream;
  float* scratch;      // floats and words of PassMemory; null if there are none
  uint32_t* counters;  // as LoraLinearArgs has them
};
struct PassMemory {
  int64_t floats = 0, counters = 0;
};

struct LoraForward : LoraPass {  // without p_b
  ConstMatrix x;
  const void* bias;  // (N) or null, fp32 or of x's type
  DType bias_dtype;
  Matrix y;
  float* u;                          // (M, R)
  const Quantised* codes = nullptr;  // in place of w, if W is no dense matrix
};
PassMemory lora_forward_memory(const LoraForward& pass);
const char* lora_forward(const LoraForward& pass);

// With g_b no dx. A gradient is wanted if its need is set; where M, N or K is 0, what is wanted, `dv` and
// scratch hold zeros before.
struct LoraBackward : LoraPass {
  bool need_x, need_A, need_B, need_bias;
  ConstMatrix dy, x;  // x: for dA
  const float* u;     // for dB
  Matrix dx, dA, dB;
  float* dbias;
  float* dv;  // (M, R): wanted, or null; s (g_d * dy) B, for the gradient of d
};
PassMemory lora_backward_memory(const LoraBackward& pass);
const char* lora_backward(const LoraBackward& pass);

}  // namespace peftkern::cuda
