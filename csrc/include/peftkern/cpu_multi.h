// Native entry points of multi_lora_linear: a batch whose rows take different adapters.
//
// Both directions of the op are the same two kernels seen from the two sides of an adapter. A side's panel
// is p (R, C): A with C = in_features, or B^T with C = out_features.
//
//   reduce   dot[i, r]   = alpha * sum_c drop(in)[i, c] * col[c] * p[r, c]      u from x and A, dv from dy
//   and B^T
//            G[r, c]     = alpha * sum_i v[i, r] * row[r] * drop(in)[i, c]
//            grad[r, c]  = col[c] * G[r, c]                                     dA from du and x, dB^T from u
//            and dy dcol[c]     = sum_r p[r, c] * G[r, c] colsum[c]   = sum_i in[i, c], i over all rows whose
//            adapter has no bias of its own
//   expand   out[i, c] = round(base[c] * src[i, c] + drop(alpha * sum_r v[i, r] * row[r] * p[r, c]) * col[c]
//   + bias[c])
//
// i runs over the rows that take the adapter. alpha is the adapter's scaling on side B, and 1 / (1 - p) on
// side A, where dropout acts. The adapter's vectors, 1 where it has none: base and col are p_b and p_d on
// side A, g_b and g_d on side B; row is d on side B, and 1 on side A, which gets du = d * dv. Where an
// adapter has an activation or a bias of its rank, v of expand and of G on side B is z = f(u + b), and du is
// d * dv * f'(u + b).
#pragma once

#include <vector>

#include "peftkern/types.h"

namespace peftkern::cpu {

// Columns of a table row, as in peftkern/ops/adapter_table.py: from kVectors on, the tensor (negative:
// absent) and the offset of each vector.
enum MultiColumn : int {
  kId,
  kRank,
  kATensor,
  kAOffset,
  kARow,
  kBTensor,
  kBOffset,
  kBN,
  kBR,
  kPadded,
  kVectors
};
enum MultiVector : int { kD, kPb, kPd, kGb, kGd, kBeta, kRankBias };
constexpr int64_t kMultiVectors = 7;
// Last in a row: the code of the activation, 0 for none.
constexpr int64_t kActivation = kVectors + 2 * kMultiVectors, kMultiColumns = kActivation + 1;

enum class Side { A, B };

// The rows that take one adapter (or none: R = 0).
struct MultiGroup {
  const int32_t* rows;  // ascending
  int64_t count;
  int64_t R;
  ConstMatrix panel[2];  // by side: A and B^T
  int tensor[2];         // which of `weights` they lie in, and where
  int64_t offset[2];
  bool padded;
  const float* vector[kMultiVectors];  // null: absent; and where they lie
  int vector_tensor[kMultiVectors];
  int64_t vector_offset[kMultiVectors];
  int activation;
  float scaling;
  float keep_scale;  // 1 / (1 - p)
  uint32_t threshold;
};

// A tensor of weights: its elements, which are adjacent.
struct MultiMemory {
  const void* data;
  int64_t elements;
};

// The adapters of a layer.
struct MultiAdapters {
  std::vector<MultiMemory> weights, vectors;  // vectors in fp32
  DType dtype = DType::f32;                   // of weights
  const int64_t* table = nullptr;             // slots x kMultiColumns
  int64_t slots = 0;
  const float* scaling = nullptr;  // (slots)
  int64_t K = 0, N = 0, max_rank = 0;
};

// What the arrays of a call say. Throws std::invalid_argument if following them would leave memory.
struct MultiBatch {
  // order: M rows; starts: slots + 3 (see the op); dropout_p: (slots) or null. Adapters and `order` must
  // outlive the batch.
  MultiBatch(const MultiAdapters& adapters, const int32_t* order, const int32_t* starts, int64_t M,
             const double* dropout_p, uint64_t seed);

  const MultiAdapters& adapters;
  int64_t M;
  uint64_t seed;
  std::vector<MultiGroup> groups;  // those with rows; rows without an adapter last

  // Whether an adapter with rows has this vector.
  bool has(MultiVector vector) const;
};
// Where the gradient of a group's vector goes; null: not wanted. grads: an address per tensor of vectors,
// null = not wanted, or none at all.
float* vector_grad(const MultiGroup& group, MultiVector vector, const std::vector<float*>& grads);

// in (M x C, any strides). dot, if given, is written whole: M x ld, zero right of a row's rank. v (M x ld)
// goes with grads (an address per tensor of weights, null = not wanted) and vector_grads (of col); groups'
// gradients are written, nothing else of the tensors.
struct MultiReduceArgs {
  Side side;
  ConstMatrix in;
  int64_t C;
  float* dot;
  const float* v;
  int64_t ld;
  const std::vector<void*>* grads;
  const std::vector<float*>* vector_grads;
  float* colsum;  // (C) or null; without dropout
  int threads;
};
void multi_reduce(const MultiBatch& batch, const MultiReduceArgs& args);

// Rows [row0, row0 + rows) and columns [col0, col0 + cols) of the output; out and src are that block. src:
// out itself, another block in fp32 or out's dtype, or null (zero). v (M x ld), bias (C, may be null) are
// whole.
struct MultiExpandArgs {
  Side side;
  Matrix out;
  ConstMatrix src;
  int64_t row0, rows, col0, cols;
  const float* v;
  int64_t ld;
  const float* bias;
  int threads;
};
void multi_expand(const MultiBatch& batch, const MultiExpandArgs& args);

// The route of M ids (see the op): fills order (M) and starts (slots + 3). Returns the first row whose id no
// slot answers to, or -1.
int64_t multi_route(const void* ids, bool wide, int64_t M, const int64_t* table, int64_t slots, int64_t mask,
                    int32_t* order, int32_t* starts);

}  // namespace peftkern::cpu
