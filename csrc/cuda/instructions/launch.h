// Starting a kernel.
#pragma once

#include <utility>

#include "cuda/instructions/device.h"

namespace peftkern::cuda {

// Bytes of shared memory that a block may have: on an architecture (80, 86, ...), and on all of them.
constexpr int64_t most_shared(int arch) {
  switch (arch) {
    case 80:
    case 87:
      return 163 * 1024;
    case 90:
    case 100:
    case 101:
    case 103:
    case 110:
      return 227 * 1024;
    default:
      return 99 * 1024;
  }
}
constexpr int64_t kSharedAnywhere = most_shared(0);

struct Size3 {
  unsigned x = 1, y = 1, z = 1;
};

struct Launch {
  Size3 grid, block;
  size_t shared = 0;  // bytes of dynamic shared memory
  void* stream = nullptr;
  unsigned cluster = 1;    // blocks along x; sm_90
  bool dependent = false;  // may start before the launch before it ends, and calls grid_wait; sm_90
};

}  // namespace peftkern::cuda

#ifdef PEFTKERN_SIM
#include "sim/instructions/launch.h"
#else

namespace peftkern::cuda {

// Returns the name of a CUDA error, or null.
template <class... Parameters, class... Arguments>
const char* launch(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
  const auto name = [](cudaError_t error) {
    return error == cudaSuccess ? nullptr : cudaGetErrorName(error);
  };
  if (how.shared > 48 * 1024) {
    const auto bytes = static_cast<int>(how.shared);
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return name(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(how.grid.x, how.grid.y, how.grid.z);
  config.blockDim = dim3(how.block.x, how.block.y, how.block.z);
  config.dynamicSmemBytes = how.shared;
  config.stream = static_cast<cudaStream_t>(how.stream);
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (how.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = how.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  if (how.dependent) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return name(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace peftkern::cuda
#endif
