// Descriptions of matrices for the TMA unit, encoded by the driver. Nothing links against the driver: its
// function is looked up at run time.
#include <cuda.h>

#include <cstring>

#include "cuda/instructions/tma.h"

namespace peftkern::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                             cudaEnableDefault, &status);
  return error == cudaSuccess && status == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function)
                                                                       : nullptr;
}

}  // namespace

const char* encode_tensor_map(const TensorMapShape& shape, TensorMap* map) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return "cudaErrorNotSupported";
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(shape.columns), static_cast<cuuint64_t>(shape.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(shape.row_stride) * 2};
  const cuuint32_t box[2] = {shape.box_columns, shape.box_rows}, steps[2] = {1, 1};
  CUtensorMap encoded;
  static_assert(sizeof encoded == sizeof(TensorMap));
  const CUresult result =
      encode(&encoded, shape.is_f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
             shape.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             shape.swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return "cudaErrorInvalidValue";
  std::memcpy(map->opaque, &encoded, sizeof encoded);
  return nullptr;
}

}  // namespace peftkern::cuda
