// What the bindings share; nothing else knows pybind11. Pointers come as integers, 0 for one that is absent.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "peftkern/types.h"

namespace peftkern {

inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Sizes must not be negative, and an address may be 0 only if nothing is read or written there.
inline void check_block(const char* name, uintptr_t address, int64_t rows, int64_t cols) {
  require(rows >= 0 && cols >= 0, (std::string(name) + ": negative size").c_str());
  require(address != 0 || rows == 0 || cols == 0, (std::string(name) + ": null pointer").c_str());
}

inline DType check_dtype(int code) {
  require(code >= 0 && code <= 2, "dtype code must be 0 (fp32), 1 (bf16) or 2 (fp16)");
  return static_cast<DType>(code);
}

// Adds the functions that start kernels on a GPU.
void bind_cuda(pybind11::module_& m);

}  // namespace peftkern
