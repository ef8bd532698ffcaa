// Torch's tensors without a header of torch: read through DLPack's exchange API (a table of C functions that
// torch.Tensor carries), made and multiplied through C functions that torch's libraries export. One binary
// serves every torch, and a function that a torch lacks is done without.
#pragma once

#include <Python.h>

#include "cpu/base/product.h"

namespace peftkern::tensors {

// Where a tensor lies: type and number as DLPack has them. The CPU if nothing else is said.
struct Device {
  int32_t type = 1, index = 0;
};
// Of a plain tensor; false, without a Python error, for anything else.
bool device_of(PyObject* object, Device& out);

// A tensor of one device. shape and strides (in elements) are the tensor's own.
struct View {
  void* data = nullptr;
  int32_t dims = 0;
  int64_t* shape = nullptr;
  int64_t* strides = nullptr;
  uint8_t kind = 0, bits = 0;  // kFloat, kBfloat or kInt, and the size of an element

  int64_t elements() const;
  // False if this is not one of the dtypes that the kernels take.
  bool dtype(DType& out) const;
  // Whether its elements are adjacent, in order.
  bool contiguous() const;
};
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

// False, without a Python error, for anything but a plain torch.Tensor or Parameter whose memory on that
// device holds what it means (no subclass, negative view, sparse or zero tensor ...).
bool read(PyObject* object, View& out, Device where = {});
// The same of a view that may stand for the negative of its memory: for its sizes, not for its elements.
bool read_layout(PyObject* object, View& out, Device where = {});

// A matrix (rows, cols): the last dimension and all those before it, if rows are a constant step apart.
bool read_rows(PyObject* object, ConstMatrix& out, int64_t& rows, int64_t& cols, View& view,
               Device where = {});
// A matrix of two dimensions, and a vector as a matrix of one row. None gives null data and keeps the sizes.
bool read_matrix(PyObject* object, ConstMatrix& out, int64_t& rows, int64_t& cols, Device where = {});
bool read_vector(PyObject* object, ConstMatrix& out, int64_t size, Device where = {});
// A torch.dtype.
bool read_dtype(PyObject* object, DType& out);

// A new contiguous tensor, uninitialised; null with a Python error.
PyObject* empty(const int64_t* shape, int dims, DType dtype, void** data, Device where = {});

// torch's own matrix product, or null where its libraries do not export one.
cpu::Product product();
// The same by Python's hand: out = (a * scale) weight^T if transpose, else (a * scale) weight. False with a
// Python error.
bool multiply_in_python(PyObject* a, PyObject* weight, bool transpose, PyObject* scale, PyObject* out);

// Adds the function tensors_set_up, by which Python brings, once: (torch.Tensor, Parameter,
// TensorBase.is_neg, torch.empty, the dtypes of the codes, the function for multiply_in_python, the path of
// torch._C or None to do without its libraries' exports). It raises where this torch has no exchange API.
// False with a Python error.
bool bind(PyObject* module);

}  // namespace peftkern::tensors
