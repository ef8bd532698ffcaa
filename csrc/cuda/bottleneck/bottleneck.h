// bottleneck_adapter on a GPU, a whole pass in one call; peftkern/ops/bottleneck_adapter.py is the
// definition. A pass says how many floats it needs beside its results, is given them, and starts its kernels;
// the functions return as those of peftkern/cuda.h do.
#pragma once

#include "peftkern/cuda.h"

namespace peftkern::cuda {

// h, residual and dy have adjacent columns, results no gaps; down (R, K) and up (N, R) have any strides.
// Vectors have no gaps, biases are fp32 or of h's type; absent if their data is null. Dropout acts on one
// side at most.
struct BottleneckPass {
  int64_t M, N, K, R;
  ConstMatrix down, up;
  const float *gate, *out_scale;  // (M), (N), or null
  Activation activation;
  float scaling;
  DeviceDropout drop_in, drop_out;
  int arch;  // compute capability of the device: 80, 90, 100
  void* stream;
  float* scratch;  // null if there is none
};

struct BottleneckForward : BottleneckPass {
  ConstMatrix h, residual, down_bias, up_bias;
  Matrix y;
  float* t;  // (M, R)
};
int64_t bottleneck_forward_floats(const BottleneckForward& pass);
const char* bottleneck_forward(const BottleneckForward& pass);

// A result whose data is null is not wanted; where a size is 0, results and scratch hold zeros before. ddown
// follows from dt. With out_scale, or where the sum over rows is weighted, the caller finishes:
//   dup (N, R)   s * sum_m e (g f(t)), without out_scale where `raw`     sums (N)   sum_m w e, w the weights
struct BottleneckBackward : BottleneckPass {
  ConstMatrix dy, h;     // h: for ddown
  const float* t;        // (M, R)
  ConstMatrix up_bias;   // for dgate
  const float* weights;  // (M), for sums with a gate or dropout of the output; else null
  bool through, raw;     // dh includes dy
  Matrix dh, ddown, dup;
  float *dt, *sums, *dgate;
};
int64_t bottleneck_backward_floats(const BottleneckBackward& pass);
const char* bottleneck_backward(const BottleneckBackward& pass);

}  // namespace peftkern::cuda
