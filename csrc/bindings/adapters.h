// The adapters of a layer as an object that is made of their tensors once, so that a call need not walk all
// of them.
#pragma once

#include <Python.h>

#include <vector>

#include "bindings/tensors.h"
#include "peftkern/cpu_multi.h"

namespace peftkern {

inline constexpr const char* kAdapters = "peftkern.adapters";

struct Adapters {
  PyObject *weights = nullptr, *vectors = nullptr;  // tuples of tensors
  PyObject *table = nullptr, *scaling = nullptr;
  bool fixed;                // the tensors of the tuples never move
  cpu::MultiAdapters known;  // with their memory if they never move

  ~Adapters() {
    for (PyObject* each : {weights, vectors, table, scaling}) Py_XDECREF(each);
  }
};

// Contiguous tensors of one dtype, which is left as it is if there are none.
inline bool read_memory(PyObject* tuple, std::vector<cpu::MultiMemory>& out, DType& shared) {
  const Py_ssize_t count = PyTuple_GET_SIZE(tuple);
  out.reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    tensors::View view;
    DType dtype;
    if (!tensors::read(PyTuple_GET_ITEM(tuple, i), view) || !view.dtype(dtype) || !view.contiguous())
      return false;
    if (i == 0) shared = dtype;
    if (dtype != shared) return false;
    out.push_back({view.data, view.elements()});
  }
  return true;
}

inline bool read_tensors(const Adapters& given, cpu::MultiAdapters& out) {
  DType vectors = DType::f32;
  return read_memory(given.weights, out.weights, out.dtype) &&
         read_memory(given.vectors, out.vectors, vectors) && vectors == DType::f32;
}

inline void destroy(PyObject* capsule) {
  delete static_cast<Adapters*>(PyCapsule_GetPointer(capsule, kAdapters));
}

}  // namespace peftkern
