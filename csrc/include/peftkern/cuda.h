// Every native entry point on GPUs. All pointers are to device memory; nothing waits for the device, and
// every launch can be captured in a CUDA graph. Functions return null, or the name of a CUDA error.
//
// Halves: bf16 or fp16. Matrices `in`, `x`, `w` and `out` are of one half type and have adjacent columns
// (col == 1), adapters (`a`, `b`, `p`) are fp32 or of that type, with any strides; sums are fp32. A pointer
// that may be null says so.
#pragma once

#include "peftkern/quantised.h"
#include "peftkern/types.h"

namespace peftkern::cuda {

// Dropout whose seed, one int64, is read when the kernel runs, so that a graph's replays may change it. seed
// null: none. Kept elements are multiplied by keep_scale = 1 / (1 - p).
struct DeviceDropout {
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;
  float keep_scale = 1;
};

// The mask itself, M x K bytes; every kernel that drops makes the same bits.
const char* dropout_mask(const int64_t* seed, int64_t M, int64_t K, uint32_t threshold, uint8_t* out,
                         void* stream);

// out[i, r] = d[r] * alpha * sum_c drop(in)[i, c] * scale[c] * p[r, c] + bias[r], fp32 (M, R) without gaps:
// u from x and A, or du from dy and B^T. The order of the sum depends on C, R and dtypes, never on M.
struct LoraShrinkArgs {
  ConstMatrix in, p;
  const float* scale;  // (C) or null
  const float* d;      // (R) or null
  float alpha;
  DeviceDropout dropout;
  int64_t M, C, R;
  float* out;
  float* partial;  // lora_shrink_partials floats; null if that is 0
  void* stream;
  ConstMatrix bias = {};  // (R) without gaps, fp32 or of in's type; data null: none
};
int64_t lora_shrink_partials(int64_t M, int64_t C, int64_t R, DType dtype);
const char* lora_shrink(const LoraShrinkArgs& args);

// out[m, n] = g_b[n] * base + drop(scaling * sum_r v[m, r] * d[r] * g_d[n] * b[n, r]) + bias[n],
// base = sum_k x[m, k] * w(n, k), rounded once, at the end. Forward: v = u, b = lora_B, no dropout here.
// Input gradient: x = dy, w = W^T, v = du, b = lora_A^T, dropout of the low-rank term; its g_b and g_d are
// the equation's p_b and p_d.
//
// With `a` (lora_linear_sm90 alone) v is an output, v = drop(x) a^T, made by the same launch, and dropout is
// of x.
struct LoraLinearArgs {
  ConstMatrix x, w;  // w.data[n * w.row + k], or, w_by_row, w.data[k * w.row + n]
  bool w_by_row;
  Matrix out;
  int64_t M, N, K, R;
  float* v;       // (M, R) without gaps
  ConstMatrix a;  // (R, K); data null: v is read
  ConstMatrix b;  // (N, R)
  float scaling;
  Scales<const float*> scales;  // p_b and p_d are not taken
  const void* bias;             // (N) or null, fp32 or of x's type
  DType bias_dtype;
  DeviceDropout dropout;
  uint32_t* counters;   // with `a`: lora_linear_counters words, zero before and after every launch; not for
                        // two launches at the same time
  int multiprocessors;  // of the device; blocks of a persistent launch
  void* stream;
};
int64_t lora_linear_counters(int64_t M);
// Whether the shapes, strides and addresses are what the kernel can take.
bool lora_linear_sm80_takes(const LoraLinearArgs& args);
bool lora_linear_sm90_takes(const LoraLinearArgs& args);
const char* lora_linear_sm80(const LoraLinearArgs& args);  // sm_80 and up: cp.async, mma
const char* lora_linear_sm90(const LoraLinearArgs& args);  // sm_90 alone: TMA, wgmma

// The same of a weight in codes in place of `w`, for few rows (of more, W is read once for every 32), without
// dropout: codes of nf4, fp4 and int4 two to a byte, of int8 with a scale for each row. dependent: the launch
// before, which writes v and nothing else of what is read, may still run; sm_90 and up.
bool lora_linear_codes_takes(const LoraLinearArgs& args, const Quantised& weight);
const char* lora_linear_codes(const LoraLinearArgs& args, const Quantised& weight, bool dependent);

// One pass over in (M, C), any part of:
//   grad[r, c] = alpha * column_scale[c] * sum_i v_scale[r] * v[i, r] * drop(in)[i, c]
//   down[i, r] = down_scale[r] * down_alpha * sum_c in[i, c] * column_scale[c] * p[r, c]
//   colsum[c]  = sum_i in[i, c]
// dA: in = x, v = du. dB^T and du at once: in = dy, v = u, p = B^T, column_scale = g_d. The order of every
// sum depends on sizes, dtypes and which parts are asked for alone; that of `down` not on M.
struct LoraGradArgs {
  ConstMatrix in;
  DeviceDropout dropout;
  int64_t M, C, R;
  const float* v;        // (M, R) without gaps, or null: no grad
  const float* v_scale;  // (R) or null
  float alpha;
  const float* column_scale;  // (C) or null
  Matrix grad;                // element (r, c), any strides, fp32 or in's type
  ConstMatrix p;              // data null: no down
  const float* down_scale;    // (R) or null
  float down_alpha;
  float* down;     // (M, R) without gaps
  float* colsum;   // (C) or null
  float* partial;  // lora_grad_partials floats
  void* stream;
  bool dependent = false;  // the second launch may start before the first ends; sm_90 and up
};
int64_t lora_grad_partials(const LoraGradArgs& args);
const char* lora_grad(const LoraGradArgs& args);

// out[n] = sqrt(sum_k (w[n, k] + scaling * sum_r b[n, r] * a[r, k])^2), for DoRA.
struct LoraRowNormArgs {
  ConstMatrix w, a, b;
  float scaling;
  int64_t N, K, R;
  float* out;      // (N)
  float* partial;  // lora_row_norm_partials floats; null if that is 0
  void* stream;
  bool dependent = false;  // as above
};
int64_t lora_row_norm_partials(int64_t N, int64_t K, int64_t R);
const char* lora_row_norm(const LoraRowNormArgs& args);

// A bottleneck onto the residual, rounded once:
//   out[m, n] = residual[m, n]
//             + drop(gate[m] * scaling * column_scale[n] * (sum_r f(v[m, r]) * b[n, r] + bias[n]))
// Forward: v = t, b = up. Input gradient: v = dt, b = down^T, f the identity. A row's bits depend on neither
// M nor the other rows.
struct BottleneckOutArgs {
  ConstMatrix residual;  // (M, N), data null: none
  const float* v;        // (M, R) without gaps
  Activation activation;
  ConstMatrix b;              // (N, R)
  ConstMatrix bias;           // (N) without gaps, fp32 or of out's type; data null: none
  const float* column_scale;  // (N) or null
  const float* gate;          // (M) or null
  float scaling;
  DeviceDropout dropout;
  int64_t M, N, R;
  Matrix out;
  void* stream;
};
const char* bottleneck_out(const BottleneckOutArgs& args);

// Between the products of a bottleneck's backward pass, what is not null of
//   z = gate[m] * f(t)      dt = gate[m] * dv * f'(t)      dgate[m] (+)= sum_r dv[m, r] * f(t)[m, r]
struct BottleneckRankArgs {
  const float *t, *dv;  // (M, R) without gaps; dv null: z alone
  const float* gate;    // (M) or null
  Activation activation;
  float *z, *dt, *dgate;  // dt may be dv
  bool adds;              // to what is in dgate
  int64_t M, R;
  void* stream;
};
const char* bottleneck_rank(const BottleneckRankArgs& args);

// out[i] = host[i], where `host` alone is in host memory, read before the call returns.
const char* store_addresses(const uint64_t* host, int64_t count, uint64_t* out, void* stream);

// out (M, N) += s[a] B[a] A[a] x, row by row; see csrc/cuda/sgmv.cu and sgmv_cluster.cu. Rows of x and out
// have adjacent columns. tensors (addresses of `weights`), table, scaling, order and starts (see
// peftkern/ops/multi_lora_linear.py) are in device memory. partial: sgmv_partials floats, null if that is 0.
// counters: sgmv_counters words, null if that is 0, zero before the first launch that uses them and after
// each; not for two launches at the same time. dependent: the launch before may still run, and writes out
// and src; until it has ended nothing is written. u, with sgmv_in_clusters, or null: A[a] x, fp32
// (M, max_rank) without gaps, zeros beyond a row's rank.
//
// vectors: addresses of the tensors that adapters' vectors lie in, null if no adapter has any. d, p_d and g_d
// act everywhere; with sgmv_in_clusters also, in every row,
//   out = g_b[a] * (src, or what is in out) + the branch + (beta[a], or the bias)
// where `src` (M, N) and `bias` (N), in fp32 or out's type, may be null. p_b: scale_rows.
struct SgmvArgs {
  DType dtype, adapter_dtype;
  void* out;
  int64_t out_row;
  const void* x;
  int64_t x_row;
  int64_t M, N, K, slots, max_rank;
  const uint64_t* tensors;
  const int64_t* table;
  const float* scaling;
  const int32_t* order;
  const int32_t* starts;
  float* u;
  float* partial;
  uint32_t* counters;
  bool dependent;
  int arch;  // compute capability of the device: 80, 90, 100
  void* stream;
  int64_t tensor_count, vector_count;
  const uint64_t* vectors;
  const void* src;
  int64_t src_row;
  const void* bias;
  DType bias_dtype;
};
int64_t sgmv_partials(int64_t M, int64_t K, int64_t max_rank, DType dtype, int arch);
int64_t sgmv_counters(int64_t M, int64_t max_rank, DType dtype, int arch);
// Whether the kernel for clusters takes the call: it needs neither partial nor counters, and can make u.
bool sgmv_in_clusters(int64_t max_rank, DType dtype, int arch);
// Whether a block's shared memory suffices for the ranks: up to 6335 on every device.
bool sgmv_takes(int64_t max_rank, DType dtype, int arch);
const char* sgmv_add(const SgmvArgs& args);  // fp32 too
// out (M, K) = x * p_b[a] row by row, x where there is no p_b, in halves: what enters a base product.
const char* scale_rows(const SgmvArgs& args);

}  // namespace peftkern::cuda
