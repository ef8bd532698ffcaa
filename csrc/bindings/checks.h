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

// A matrix that is written: rows must not overlap.
inline void check_matrix(const char* name, uintptr_t address, int64_t rows, int64_t cols, int64_t ld) {
  check_block(name, address, rows, cols);
  require(rows <= 1 || ld >= cols, (std::string(name) + ": ld is less than the number of columns").c_str());
}

inline int check_threads(int threads) {
  require(threads >= 1, "threads must be at least 1");
  return threads;
}

// Each adds the functions of one group: base product, rotated blocks, bottlenecks, branch of one adapter,
// lora_linear as a whole, row norms, many adapters, the check of a call plan, kernels on a GPU.
void bind_adapter_list(pybind11::module_& m);
void bind_base(pybind11::module_& m);
void bind_block_rotate(pybind11::module_& m);
void bind_bottleneck_adapter(pybind11::module_& m);
void bind_lora(pybind11::module_& m);
void bind_lora_linear(pybind11::module_& m);
void bind_lora_row_norm(pybind11::module_& m);
void bind_multi_lora_linear(pybind11::module_& m);
void bind_unchanged(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);

}  // namespace peftkern
