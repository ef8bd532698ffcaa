// y = scale * x by 16 bytes a thread, and what the audit must notice when it is built with one of these
// macros.
#include <cuda_runtime.h>

#ifndef BOUNDS
#define BOUNDS __launch_bounds__(128)
#endif

extern "C" __global__ void BOUNDS scale_kernel(const float4* x, float4* y, float* sum, float scale, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
#ifdef NARROW
  const auto* from = reinterpret_cast<const float*>(x) + 4 * i;
  const float4 v = {from[0], from[1], from[2], from[3]};
#else
  const float4 v = x[i];
#endif
#ifdef LOCAL_ARRAY
  volatile float values[64];
  for (int k = 0; k < 64; ++k) values[(k * n) % 64] = v.x * static_cast<float>(k) * scale;
  y[i] = {v.y, v.z, v.w, values[i % 64]};
#else
  y[i] = {v.x * scale, v.y * scale, v.z * scale, v.w * scale};
#endif
#ifdef ATOMIC
  atomicAdd(sum, v.x);
#endif
#ifdef SHARED
  __shared__ float4 kept[1024];
  kept[threadIdx.x] = v;
  __syncthreads();
  y[n - i] = kept[n % 128];
#endif
}
