// What the kernels of the segmented branch share.
#pragma once

#include "cuda/instructions/device.h"
#include "peftkern/cpu_multi.h"
#include "peftkern/cuda.h"

namespace peftkern::cuda {

template <class Adapter>
PEFTKERN_DEVICE const Adapter* matrix(const SgmvArgs& args, const int64_t* row, int tensor, int offset) {
  return reinterpret_cast<const Adapter*>(args.tensors[row[tensor]]) + row[offset];
}

// The launch of sgmv_cluster.cu.
const char* sgmv_cluster_add(const SgmvArgs& args);

}  // namespace peftkern::cuda
