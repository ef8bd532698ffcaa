// What an entry hands out: new tensors, given back if it fails half way.
#pragma once

#include <Python.h>

#include <algorithm>
#include <utility>

#include "bindings/tensors.h"

namespace peftkern {

// Tensors that a call has made so far; given back unless they are handed out.
class Results {
 public:
  explicit Results(tensors::Device where = {}) : where_(where) {}
  Results(const Results&) = delete;
  Results& operator=(const Results&) = delete;
  ~Results() {
    for (int i = 0; i < count_; ++i) Py_XDECREF(made_[i]);
  }

  // A new tensor; null data, with a Python error, if there is none.
  bool make(const int64_t* shape, int dims, DType dtype, void** data) {
    made_[count_] = tensors::empty(shape, dims, dtype, data, where_);
    return made_[count_++] != nullptr;
  }
  // What was made elsewhere.
  void add(PyObject* made) { made_[count_++] = made; }
  // Nothing in its place.
  void skip() { made_[count_++] = nullptr; }

  int count() const { return count_; }
  PyObject* at(int i) const { return made_[i]; }
  PyObject* take(int i) { return std::exchange(made_[i], nullptr); }
  void drop(int i) { Py_CLEAR(made_[i]); }
  // All of them, None where nothing is.
  PyObject* tuple() {
    PyObject* out = PyTuple_New(count_);
    for (int i = 0; out != nullptr && i < count_; ++i) {
      PyObject* each = take(i);
      if (each == nullptr) Py_INCREF(each = Py_None);
      PyTuple_SET_ITEM(out, i, each);
    }
    return out;
  }

 private:
  const tensors::Device where_;
  PyObject* made_[9] = {};
  int count_ = 0;
};

inline bool make_matrix(Results& results, bool wanted, int64_t rows, int64_t cols, DType dtype, Matrix& out) {
  if (!wanted) {
    results.skip();
    return true;
  }
  const int64_t shape[] = {rows, cols};
  out.dtype = dtype, out.row = cols, out.col = 1;
  return results.make(shape, 2, dtype, &out.data);
}

inline bool make_floats(Results& results, bool wanted, int64_t size, float*& out) {
  void* data = nullptr;
  if (!wanted) {
    results.skip();
    return true;
  }
  const bool made = results.make(&size, 1, DType::f32, &data);
  out = static_cast<float*>(data);
  return made;
}

// What an entry answers whose results were not made: an error if there is one, else that the call is not its.
inline PyObject* nothing() {
  return PyErr_Occurred() != nullptr ? nullptr : Py_NewRef(Py_None);
}

// A matrix in the shape of `like`, but for the last dimension.
inline bool make_rows(Results& results, bool wanted, const tensors::View& like, int64_t cols, DType dtype,
                      Matrix& out) {
  constexpr int kMaxDims = 64;
  if (!wanted || like.dims > kMaxDims) {
    results.skip();
    return !wanted;
  }
  int64_t shape[kMaxDims];
  std::copy_n(like.shape, like.dims - 1, shape);
  shape[like.dims - 1] = cols;
  out.dtype = dtype, out.row = cols, out.col = 1;
  return results.make(shape, like.dims, dtype, &out.data);
}

}  // namespace peftkern
