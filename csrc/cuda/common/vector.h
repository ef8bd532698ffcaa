// Single elements of vectors that may be of any type.
#pragma once

#include "cuda/instructions/convert.h"

namespace peftkern::cuda {

// Element i of a vector without gaps.
PEFTKERN_DEVICE float element_of(const ConstMatrix& v, int64_t i) {
  switch (v.dtype) {
    case DType::bf16:
      return to_float(static_cast<const bf16*>(v.data)[i]);
    case DType::f16:
      return to_float(static_cast<const f16*>(v.data)[i]);
    default:
      return static_cast<const float*>(v.data)[i];
  }
}

}  // namespace peftkern::cuda
