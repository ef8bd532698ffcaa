// The matrices of a list of adapters, checked: what table_of (peftkern/many/table.py) does of an ordinary
// list, without a call into Python code for each of them. Nothing is kept from one call to the next.
#include <cmath>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "bindings/tensors.h"

namespace peftkern {
namespace {

// A contiguous matrix.
bool read_matrix(PyObject* object, int64_t& rows, int64_t& cols, DType& dtype) {
  tensors::View view;
  if (!tensors::read_layout(object, view) || view.dims != 2 || !view.dtype(dtype) || !view.contiguous())
    return false;
  rows = view.shape[0], cols = view.shape[1];
  return true;
}

// A finite number: float or int, no bool.
bool read_scaling(PyObject* object, double& out) {
  if (!PyFloat_CheckExact(object) && !PyLong_CheckExact(object)) return false;
  return read_double(object, out) && std::isfinite(out);
}

// What a tuple of adapters is: matrices that it holds, and numbers.
struct List {
  std::vector<PyObject*> weights;
  std::vector<int64_t> ranks;
  std::vector<double> scalings;
  int64_t N = -1;

  // False: not ordinary, which it may be all the same.
  bool read(PyObject* adapters, int64_t K, DType activation) {
    DType shared = DType::f32;
    const Py_ssize_t count = PyTuple_GET_SIZE(adapters);
    weights.reserve(2 * count), ranks.reserve(count), scalings.reserve(count);
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* each = PyTuple_GET_ITEM(adapters, i);
      if (!PyTuple_CheckExact(each) || PyTuple_GET_SIZE(each) != 3) return false;
      PyObject *A = PyTuple_GET_ITEM(each, 0), *B = PyTuple_GET_ITEM(each, 1);
      int64_t rank, cols, rows, width;
      double scaling;
      DType dtypes[2];
      if (!read_scaling(PyTuple_GET_ITEM(each, 2), scaling) || !read_matrix(A, rank, cols, dtypes[0]) ||
          !read_matrix(B, rows, width, dtypes[1]))
        return false;
      if (i == 0) shared = dtypes[0], N = rows;
      if (cols != K || rows != N || width != rank || dtypes[0] != shared || dtypes[1] != shared) return false;
      weights.push_back(A), weights.push_back(B);
      ranks.push_back(rank), scalings.push_back(scaling);
    }
    return count > 0 && fits(shared, activation);
  }
};

template <class T, class Make>
PyObject* tuple_of(const std::vector<T>& from, const Make& make) {
  PyObject* out = PyTuple_New(static_cast<Py_ssize_t>(from.size()));
  for (size_t i = 0; out != nullptr && i < from.size(); ++i) {
    PyObject* each = make(from[i]);
    if (each == nullptr)
      Py_CLEAR(out);
    else
      PyTuple_SET_ITEM(out, static_cast<Py_ssize_t>(i), each);
  }
  return out;
}

PyObject* result(const List& list) {
  PyObject* weights = tuple_of(list.weights, [](PyObject* each) { return Py_NewRef(each); });
  PyObject* ranks = tuple_of(list.ranks, [](int64_t each) { return PyLong_FromLongLong(each); });
  PyObject* scalings = tuple_of(list.scalings, [](double each) { return PyFloat_FromDouble(each); });
  PyObject* N = PyLong_FromLongLong(list.N);
  PyObject* out = nullptr;
  if (weights != nullptr && ranks != nullptr && scalings != nullptr && N != nullptr)
    out = PyTuple_Pack(4, weights, ranks, scalings, N);
  for (PyObject* each : {weights, ranks, scalings, N}) Py_XDECREF(each);
  return out;
}

PyObject* adapter_list(PyObject*, PyObject* const* a, Py_ssize_t count) {
  enum { kAdapters, kInFeatures, kDType, kCount };
  int64_t K;
  DType activation;
  if (count != kCount || !PyLong_CheckExact(a[kInFeatures]) || !read_int(a[kInFeatures], K) ||
      !tensors::read_dtype(a[kDType], activation) ||
      !(PyList_CheckExact(a[kAdapters]) || PyTuple_CheckExact(a[kAdapters])))
    Py_RETURN_NONE;
  // Nobody changes a tuple, as others might a list while torch answers for a tensor.
  PyObject* adapters = PySequence_Tuple(a[kAdapters]);
  if (adapters == nullptr) return nullptr;
  List list;
  PyObject* out = list.read(adapters, K, activation) ? result(list) : Py_NewRef(Py_None);
  Py_DECREF(adapters);
  return out;
}

PyMethodDef methods[] = {
    {"adapter_list", fast(adapter_list), METH_FASTCALL,
     "(adapters, in_features, dtype) -> (matrices, ranks, scalings, out_features) of a list of (lora_A, "
     "lora_B, scaling) whose matrices are contiguous, on the CPU, all of dtype or all fp32; None: not "
     "ordinary."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_adapter_list(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace peftkern
