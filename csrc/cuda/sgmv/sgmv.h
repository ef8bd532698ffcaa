// What the kernels of the segmented branch share: how they read the table of adapters.
#pragma once

#include "cuda/instructions/device.h"
#include "cuda/instructions/warp.h"
#include "peftkern/cpu_multi.h"
#include "peftkern/cuda.h"

namespace peftkern::cuda {

template <class Adapter>
PEFTKERN_DEVICE const Adapter* matrix(const SgmvArgs& args, const int64_t* row, int tensor, int offset) {
  return reinterpret_cast<const Adapter*>(args.tensors[row[tensor]]) + row[offset];
}

// An adapter's vector, null where it has none.
PEFTKERN_DEVICE const float* vector_of(const SgmvArgs& args, const int64_t* row, cpu::MultiVector which) {
  if (args.vectors == nullptr) return nullptr;
  const int64_t tensor = row[cpu::kVectors + 2 * which];
  if (tensor < 0) return nullptr;
  return reinterpret_cast<const float*>(args.vectors[tensor]) + row[cpu::kVectors + 2 * which + 1];
}

// Whether the launch knows all that a row of the table names: one in a captured graph knows the tensors of
// then, while a bank may have more by now. The rows of other adapters become NaN.
PEFTKERN_DEVICE bool known(const SgmvArgs& args, const int64_t* row, bool with_vectors) {
  bool all = row[cpu::kRank] == 0 ||
             (row[cpu::kATensor] < args.tensor_count && row[cpu::kBTensor] < args.tensor_count);
  if (with_vectors) {
#pragma unroll
    for (int i = 0; i < cpu::kMultiVectors; ++i) all = all && row[cpu::kVectors + 2 * i] < args.vector_count;
  }
  return all;
}

// The segment s with number(s) <= index < number(s + 1), of which there are so many: for all lanes of a warp.
template <class Number>
PEFTKERN_DEVICE int find_segment(int segments, int index, const Number& number) {
  int low = 0, high = segments;
  while (high - low > 1) {
    const int step = (high - low + 31) / 32, probe = low + lane_index() * step;
    const uint32_t below = ballot(probe < high && number(probe) <= index);
    low += (count_ones(below) - 1) * step;
    high = low + step < high ? low + step : high;
  }
  return low;
}

// The launch of sgmv_cluster.cu.
const char* sgmv_cluster_add(const SgmvArgs& args);

}  // namespace peftkern::cuda
