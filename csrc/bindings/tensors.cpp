#include "bindings/tensors.h"

#include <dlfcn.h>

#include <stdexcept>

namespace peftkern::tensors {
namespace {

// --- DLPack 1.3, as far as it is used ---
struct DlTensor {
  void* data;
  Device device;
  int32_t dims;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DlExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*view_of_object)(void* object, DlTensor* out);
  void* current_stream;
};
constexpr int32_t kDlCpu = 1, kDlCuda = 2;

// --- what torch's libraries export: functions of its C shim, and the step from there to Python ---
using Handle = void*;  // at::Tensor*
constexpr int32_t kAtenCpu = 0, kAtenCuda = 1;
constexpr int32_t kAtenTypes[] = {6, 15, 5};  // of the dtype codes: Float, BFloat16, Half
struct Exported {
  int (*empty_strided)(int64_t dims, const int64_t* shape, const int64_t* strides, int32_t dtype,
                       int32_t device, int32_t index, Handle* out);
  int (*from_blob)(void* data, int64_t dims, const int64_t* shape, const int64_t* strides, int64_t offset,
                   int32_t dtype, int32_t device, int32_t index, Handle* out);
  int (*mm_out)(Handle out, Handle a, Handle b);
  int (*destroy)(Handle tensor);
  PyObject* (*wrap)(const void* tensor);  // THPVariable_Wrap(const at::TensorBase&)
};

struct State {
  const DlExchangeApi* api = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyCFunction is_neg = nullptr;
  PyObject *empty = nullptr, *product = nullptr;
  PyObject* keywords[3] = {};  // {"dtype": ...} for each dtype code
  Exported torch{};
} state;

template <class F>
bool look_up(void* library, const char* name, F& out) {
  out = reinterpret_cast<F>(dlsym(library, name));
  return out != nullptr;
}

// Through torch._C, which links all of torch's libraries.
void look_up_exports(const char* path) {
  void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return;
  Exported& e = state.torch;
  const bool all = look_up(library, "aoti_torch_delete_tensor_object", e.destroy) &&
                   look_up(library, "aoti_torch_empty_strided", e.empty_strided) &&
                   look_up(library, "_Z16THPVariable_WrapRKN2at10TensorBaseE", e.wrap);
  if (!all) e.wrap = nullptr;
  const bool product = e.destroy != nullptr &&
                       look_up(library, "aoti_torch_create_tensor_from_blob", e.from_blob) &&
                       look_up(library, "aoti_torch_cpu_mm_out", e.mm_out);
  if (!product) e.mm_out = nullptr;
}

// A matrix of someone else's memory as a tensor of torch's.
class Borrowed {
 public:
  Borrowed(int64_t rows, int64_t cols, const ConstMatrix& m) {
    const int64_t shape[] = {rows, cols}, strides[] = {m.row, m.col};
    if (state.torch.from_blob(const_cast<void*>(m.data), 2, shape, strides, 0,
                              kAtenTypes[static_cast<int>(m.dtype)], kAtenCpu, -1, &handle) != 0)
      throw std::runtime_error("torch could not make a tensor of a matrix");
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed() { state.torch.destroy(handle); }
  Handle handle = nullptr;
};

void multiply(int64_t M, int64_t D, int64_t C, const ConstMatrix& a, const ConstMatrix& b,
              const Matrix& out) {
  const Borrowed left(M, C, a), right(C, D, b), result(M, D, cpu::as_const(out));
  if (state.torch.mm_out(result.handle, left.handle, right.handle) != 0)
    throw std::runtime_error("torch's matrix product failed");
}

PyObject* empty_through_python(const int64_t* shape, int dims, DType dtype, Device where) {
  PyObject* sizes = PyTuple_New(dims);
  for (int i = 0; sizes != nullptr && i < dims; ++i)
    PyTuple_SET_ITEM(sizes, i, PyLong_FromLongLong(shape[i]));
  PyObject* args = sizes != nullptr ? PyTuple_Pack(1, sizes) : nullptr;
  PyObject* keywords = Py_NewRef(state.keywords[static_cast<int>(dtype)]);
  if (where.type != kDlCpu) {
    Py_SETREF(keywords, PyDict_Copy(keywords));
    PyObject* device = PyUnicode_FromFormat("cuda:%d", where.index);
    if (keywords != nullptr && (device == nullptr || PyDict_SetItemString(keywords, "device", device) != 0))
      Py_CLEAR(keywords);
    Py_XDECREF(device);
  }
  PyObject* out =
      args != nullptr && keywords != nullptr ? PyObject_Call(state.empty, args, keywords) : nullptr;
  for (PyObject* each : {keywords, args, sizes}) Py_XDECREF(each);
  return out;
}

PyObject* empty_through_exports(const int64_t* shape, int dims, DType dtype, Device where) {
  constexpr int kMaxDims = 64;
  if (dims > kMaxDims) return empty_through_python(shape, dims, dtype, where);
  int64_t strides[kMaxDims], step = 1;
  for (int i = dims - 1; i >= 0; --i) {
    strides[i] = step;
    step *= std::max<int64_t>(shape[i], 1);
  }
  Handle handle = nullptr;
  const bool cpu = where.type == kDlCpu;
  if (state.torch.empty_strided(dims, shape, strides, kAtenTypes[static_cast<int>(dtype)],
                                cpu ? kAtenCpu : kAtenCuda, cpu ? -1 : where.index, &handle) != 0)
    return empty_through_python(shape, dims, dtype, where);  // which raises torch's own error
  PyObject* out = state.torch.wrap(handle);
  state.torch.destroy(handle);
  return out;
}

bool view_of(PyObject* object, DlTensor& out) {
  if (state.api == nullptr || (Py_TYPE(object) != state.tensor && Py_TYPE(object) != state.parameter))
    return false;
  if (state.api->view_of_object(object, &out) == 0) return true;
  PyErr_Clear();
  return false;
}

}  // namespace

int64_t View::elements() const {
  int64_t n = 1;
  for (int i = 0; i < dims; ++i) n *= shape[i];
  return n;
}

bool View::dtype(DType& out) const {
  if (kind == kFloat && bits == 32) {
    out = DType::f32;
  } else if (kind == kBfloat && bits == 16) {
    out = DType::bf16;
  } else if (kind == kFloat && bits == 16) {
    out = DType::f16;
  } else {
    return false;
  }
  return true;
}

bool View::contiguous() const {
  int64_t step = 1;
  bool adjacent = true;
  for (int i = dims - 1; i >= 0; --i) {
    adjacent = adjacent && (shape[i] == 1 || strides[i] == step);
    step *= shape[i];
  }
  return adjacent || step == 0;
}

bool device_of(PyObject* object, Device& out) {
  DlTensor t;
  if (!view_of(object, t)) return false;
  out = t.device;
  return out.type == kDlCpu || out.type == kDlCuda;
}

bool read_layout(PyObject* object, View& out, Device where) {
  DlTensor t;
  if (!view_of(object, t)) return false;
  out = {static_cast<char*>(t.data) + t.byte_offset, t.dims, t.shape, t.strides, t.dtype.code, t.dtype.bits};
  if (t.device.type != where.type || (where.type != kDlCpu && t.device.index != where.index)) return false;
  if (t.dtype.lanes != 1 || (t.dims > 0 && t.strides == nullptr)) return false;
  return t.data != nullptr || out.elements() == 0;
}

bool read(PyObject* object, View& out, Device where) {
  if (!read_layout(object, out, where)) return false;
  // Nothing in DLPack says that a view stands for the negative of its memory.
  PyObject* negative = state.is_neg(object, nullptr);
  const bool plain = negative == Py_False;
  Py_XDECREF(negative);
  if (negative == nullptr) PyErr_Clear();
  return plain;
}

bool read_rows(PyObject* object, ConstMatrix& out, int64_t& rows, int64_t& cols, View& view, Device where) {
  if (!read(object, view, where) || view.dims < 1 || !view.dtype(out.dtype)) return false;
  const int last = view.dims - 1;
  rows = 1, cols = view.shape[last];
  out.data = view.data, out.row = cols, out.col = view.strides[last];
  bool even = true;
  for (int i = last - 1; i >= 0; --i) {
    if (view.shape[i] == 1) continue;
    if (rows == 1) out.row = view.strides[i];
    even = even && view.strides[i] == rows * out.row;
    rows *= view.shape[i];
  }
  return even || rows * cols == 0;
}

bool read_dtype(PyObject* object, DType& out) {
  for (int i = 0; i < 3; ++i) {
    if (object != PyDict_GetItemString(state.keywords[i], "dtype")) continue;
    out = static_cast<DType>(i);
    return true;
  }
  return false;
}

bool read_matrix(PyObject* object, ConstMatrix& out, int64_t& rows, int64_t& cols, Device where) {
  View view;
  if (!read(object, view, where) || view.dims != 2 || !view.dtype(out.dtype)) return false;
  rows = view.shape[0], cols = view.shape[1];
  out.data = view.data, out.row = view.strides[0], out.col = view.strides[1];
  return true;
}

bool read_vector(PyObject* object, ConstMatrix& out, int64_t size, Device where) {
  if (object == Py_None) return true;
  View view;
  if (!read(object, view, where) || view.dims != 1 || view.shape[0] != size || !view.dtype(out.dtype))
    return false;
  out.data = view.data, out.row = size, out.col = view.strides[0];
  return true;
}

PyObject* empty(const int64_t* shape, int dims, DType dtype, void** data, Device where) {
  PyObject* out = state.torch.wrap != nullptr ? empty_through_exports(shape, dims, dtype, where)
                                              : empty_through_python(shape, dims, dtype, where);
  DlTensor t;
  if (out != nullptr && state.api->view_of_object(out, &t) != 0) Py_CLEAR(out);
  if (out != nullptr) *data = t.data;
  return out;
}

cpu::Product product() {
  return state.torch.mm_out != nullptr ? multiply : nullptr;
}

bool multiply_in_python(PyObject* a, PyObject* weight, bool transpose, PyObject* scale, PyObject* out) {
  PyObject* done = PyObject_CallFunctionObjArgs(state.product, a, weight, transpose ? Py_True : Py_False,
                                                scale, out, nullptr);
  Py_XDECREF(done);
  return done != nullptr;
}

namespace {

PyObject* set_up(PyObject*, PyObject* args) {
  PyObject *tensor, *parameter, *is_neg, *empty, *dtypes[3], *product;
  const char* path;
  if (!PyArg_ParseTuple(args, "OOOO(OOO)Oz", &tensor, &parameter, &is_neg, &empty, dtypes, dtypes + 1,
                        dtypes + 2, &product, &path))
    return nullptr;
  PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) return nullptr;
  const auto* api = static_cast<const DlExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (api == nullptr) return nullptr;
  if (api->major != 1 || !PyType_Check(tensor) || !PyType_Check(parameter) ||
      !PyObject_TypeCheck(is_neg, &PyMethodDescr_Type)) {
    PyErr_SetString(PyExc_RuntimeError, "an exchange API of another DLPack, or types of another torch");
    return nullptr;
  }
  const PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(is_neg)->d_method;
  if (method->ml_flags != METH_NOARGS) {
    PyErr_SetString(PyExc_RuntimeError, "is_neg takes arguments");
    return nullptr;
  }
  // Held for good: the module is never unloaded.
  for (PyObject* each : {tensor, parameter, is_neg, empty, product}) Py_INCREF(each);
  for (int i = 0; i < 3; ++i) state.keywords[i] = Py_BuildValue("{sO}", "dtype", dtypes[i]);
  state.tensor = reinterpret_cast<PyTypeObject*>(tensor);
  state.parameter = reinterpret_cast<PyTypeObject*>(parameter);
  state.is_neg = method->ml_meth;
  state.empty = empty, state.product = product;
  state.torch = Exported{};
  if (path != nullptr) look_up_exports(path);
  state.api = api;
  Py_RETURN_NONE;
}

}  // namespace

bool bind(PyObject* module) {
  static PyMethodDef methods[] = {
      {"tensors_set_up", set_up, METH_VARARGS, "What the entries that take tensors need of torch, once."},
      {nullptr, nullptr, 0, nullptr}};
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace peftkern::tensors
