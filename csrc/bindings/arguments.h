// What entries that take tensors do with their arguments. A function that reads one returns false, without a
// Python error, for a call that is not ordinary.
#pragma once

#include <Python.h>

#include <stdexcept>
#include <string>

#include "bindings/quantised.h"
#include "bindings/tensors.h"
#include "peftkern/cpu.h"

namespace peftkern {

inline bool read_double(PyObject* object, double& out) {
  out = PyFloat_AsDouble(object);
  if (out == -1.0 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    return false;
  }
  return true;
}

inline bool read_int(PyObject* object, int64_t& out) {
  out = PyLong_AsLongLong(object);
  if (out == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    return false;
  }
  return true;
}

inline bool read_threads(PyObject* object, int& out) {
  int64_t threads;
  if (!read_int(object, threads) || threads < 1 || threads > 1 << 16) return false;
  out = static_cast<int>(threads);
  return true;
}

// Contiguous integers of this size, or floating-point numbers if kind says so.
template <class T>
bool read_array(PyObject* object, const T*& out, int64_t size, uint8_t kind = tensors::kInt,
                tensors::Device where = {}) {
  tensors::View view;
  if (!tensors::read(object, view, where) || view.kind != kind || view.bits != 8 * sizeof(T) ||
      !view.contiguous() || view.elements() != size)
    return false;
  out = static_cast<const T*>(view.data);
  return true;
}

// A seed of dropout: one element.
inline bool read_seed(PyObject* object, uint64_t& out) {
  const int64_t* seed;
  if (!read_array(object, seed, 1)) return false;
  out = static_cast<uint64_t>(*seed);
  return true;
}

// Scaling, and dropout as the kernels take it: what an element's bits are compared with, and the factor of
// those that are kept.
inline bool read_numbers(PyObject* scaling, PyObject* dropout_p, float& s, uint32_t& threshold, float& kept) {
  double given, p;
  if (!read_double(scaling, given) || !read_double(dropout_p, p) || !(p >= 0.0 && p < 1.0)) return false;
  s = static_cast<float>(given);
  threshold = static_cast<uint32_t>(p * 4294967296.0);
  kept = static_cast<float>(1.0 / (1.0 - p));
  return true;
}

// A matrix that may be absent, of known sizes.
inline bool read_sized(PyObject* object, ConstMatrix& out, int64_t rows, int64_t cols,
                       tensors::Device where = {}) {
  int64_t found_rows = rows, found_cols = cols;
  return (object == Py_None || tensors::read_matrix(object, out, found_rows, found_cols, where)) &&
         found_rows == rows && found_cols == cols;
}

// The same, contiguous and in fp32, as what an entry has made itself.
inline bool read_floats(PyObject* object, const float*& out, int64_t rows, int64_t cols,
                        tensors::Device where = {}) {
  ConstMatrix m;
  if (!read_sized(object, m, rows, cols, where) || m.dtype != DType::f32) return false;
  if (m.data != nullptr && rows * cols > 0 && (m.col != 1 || (rows > 1 && m.row != cols))) return false;
  out = static_cast<const float*>(m.data);
  return true;
}

// Adapters, vectors and biases are in fp32 or in the activation's dtype.
inline bool fits(DType dtype, DType activation) {
  return dtype == DType::f32 || dtype == activation;
}

// The kind of that name, if it can compute the product of M rows of this dtype with this weight (null: there
// is none) at all; else a Python error and false. `scaled`: the rows have a scale.
inline bool read_kind(PyObject* word, int64_t M, DType dtype, const ConstMatrix* weight, bool scaled,
                      cpu::BaseKind& out) {
  constexpr const char* kWords[] = {"vendor", "panels", "bf16", "amx", "few", "int8", "identity"};
  const char* text = PyUnicode_AsUTF8(word);
  if (text == nullptr) return false;
  for (int i = 0; i < 7; ++i) {
    if (std::string(text) != kWords[i]) continue;
    out = static_cast<cpu::BaseKind>(i);
    if ((out == cpu::BaseKind::identity) != (weight == nullptr)) break;
    const bool unit = weight != nullptr && (weight->row == 1 || weight->col == 1);
    if (out == cpu::BaseKind::few && (M > cpu::kBaseFewRows || !unit)) break;
    const bool pairs = dtype == DType::bf16 && !scaled;
    if (out == cpu::BaseKind::bf16 && !(pairs && cpu::base_gemm_bf16_usable())) break;
    if (out == cpu::BaseKind::amx && !(pairs && cpu::base_gemm_amx_usable())) break;
    return true;
  }
  PyErr_Format(PyExc_ValueError, "the base product cannot be computed by %s", text);
  return false;
}

// A frozen weight as an entry is told of it: the kind (peftkern/bases), and the tensor or tensors where it
// has some.
struct Base {
  enum Kind { kDense, kIdentity, kNone, kQuantised } kind = kNone;
  ConstMatrix weight;  // its memory is not quantised's
  Quantised quantised;

  Base() = default;
  Base(const Base&) = delete;  // `coded` points into it

  // False for a kind that has no loader here, so that none is taken for another.
  bool read(PyObject* word, PyObject* object, int64_t N, int64_t K, DType dtype) {
    if (!PyUnicode_Check(word)) return false;
    if (PyUnicode_CompareWithASCIIString(word, "none") == 0) return true;
    if (PyUnicode_CompareWithASCIIString(word, "identity") == 0) {
      kind = kIdentity;
      return object == Py_None && N == K;
    }
    if (PyUnicode_CompareWithASCIIString(word, "dense") == 0) {
      kind = kDense;
      return object != Py_None && read_sized(object, weight, N, K) && weight.dtype == dtype;
    }
    kind = kQuantised;
    weight = {nullptr, dtype, K > 1 ? K : 2, 1};  // strides tell W from W^T, whatever K is
    return object != Py_None && read_quantised(word, object, N, K, quantised);
  }
  // Null for a dense one.
  const Quantised* coded() const { return kind == kQuantised ? &quantised : nullptr; }
  // Who computes its product, likewise: nobody if there is none.
  bool read_way(PyObject* word, int64_t M, DType dtype, bool scaled, cpu::BaseKind& out) const {
    const bool weighted = kind == kDense || kind == kQuantised;
    if (kind == kNone || !read_kind(word, M, dtype, weighted ? &weight : nullptr, scaled, out))
      return kind == kNone;
    const bool integers = kind == kQuantised && quantised.integers;
    if (integers == (out == cpu::BaseKind::int8)) return true;
    PyErr_SetString(PyExc_ValueError, integers ? "a product with rounded rows is one of integers"
                                               : "a product of integers needs rows that may be rounded");
    return false;
  }
  // What a choice may depend on.
  int64_t which() const {
    return 64 * kind + (kind == kQuantised ? 1 + static_cast<int64_t>(quantised.code) : 0) +
           32 * quantised.integers;
  }
  int64_t strides() const { return 2 * (weight.row == 1) + (weight.col == 1); }
};

// Runs a pass without the GIL. False with a Python error.
template <class Pass>
bool run(const Pass& pass) {
  std::string error;
  PyObject* type = PyExc_RuntimeError;
  PyThreadState* thread = PyEval_SaveThread();
  try {
    pass();
  } catch (const std::invalid_argument& e) {
    error = e.what(), type = PyExc_ValueError;
  } catch (const std::exception& e) {
    error = e.what();
  }
  PyEval_RestoreThread(thread);
  if (!error.empty()) PyErr_SetString(type, error.c_str());
  return error.empty();
}

// The vendor's product for a pass; where torch's libraries do not export one, Python fills `out` with
// (a * scale) weight^T if transpose, else (a * scale) weight, in advance, and codes are multiplied by ours.
// False with a Python error.
inline bool prepare_product(cpu::BaseKind& kind, cpu::Product& vendor, PyObject* a, PyObject* weight,
                            bool coded, bool transpose, PyObject* scale, PyObject* out) {
  vendor = tensors::product();
  if (kind != cpu::BaseKind::vendor || vendor != nullptr) return true;
  if (coded) {
    kind = cpu::BaseKind::panels;
    return true;
  }
  kind = cpu::BaseKind::given;
  return tensors::multiply_in_python(a, weight, transpose, scale, out);
}

template <class F>
PyCFunction fast(F function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

}  // namespace peftkern
