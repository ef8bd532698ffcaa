// block_rotate, its gradient, and what OFT makes its matrices of, on the CPU, a call each: tensors in, a
// tensor out. None for a call that is not ordinary.
#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "bindings/results.h"
#include "bindings/tensors.h"
#include "peftkern/cpu.h"
#include "peftkern/cpu_series.h"

namespace peftkern {
namespace {

// A permutation of K columns, or None. `wrong`: a column that is not there.
bool read_index(PyObject* object, int64_t K, const int64_t*& out, bool& wrong) {
  if (object == Py_None) return true;
  if (!read_array(object, out, K)) return false;
  for (int64_t c = 0; c < K; ++c) wrong |= out[c] < 0 || out[c] >= K;
  return true;
}

PyObject* refuse_index(int64_t K) {
  return PyErr_Format(PyExc_IndexError, "index has a column that is not within 0 to %lld",
                      static_cast<long long>(K - 1));
}

// (G, b, b) or (1, b, b).
bool read_blocks(PyObject* object, int64_t K, DType dtype, cpu::BlockRotateArgs& g) {
  tensors::View r;
  if (!tensors::read(object, r) || r.dims != 3 || !r.dtype(g.r.dtype) || !fits(g.r.dtype, dtype))
    return false;
  const int64_t blocks = r.shape[0], b = r.shape[2];
  if (r.shape[1] != b || b < 1 || b > cpu::kMaxBlock || K % b != 0 || (blocks != 1 && blocks * b != K))
    return false;
  g.r.data = r.data, g.r.row = r.strides[1], g.r.col = r.strides[2];
  g.r_block = blocks == 1 ? 0 : r.strides[0];
  g.blocks = K / b, g.size = b;
  return true;
}

PyObject* block_rotate(PyObject*, PyObject* const* a, Py_ssize_t count) {
  cpu::BlockRotateArgs g{};
  int64_t K = 0;
  bool wrong = false;
  if (count != 4 || !read_threads(a[0], g.threads) || !tensors::read_matrix(a[1], g.x, g.M, K) ||
      !read_blocks(a[2], K, g.x.dtype, g) || !read_index(a[3], K, g.index, wrong))
    Py_RETURN_NONE;
  if (wrong) return refuse_index(K);
  Results results;
  if (!make_matrix(results, true, g.M, K, g.x.dtype, g.y)) return nullptr;
  return run([&] { cpu::block_rotate(g); }) ? results.take(0) : nullptr;
}

PyObject* block_rotate_grad(PyObject*, PyObject* const* a, Py_ssize_t count) {
  cpu::BlockRotateGradArgs g{};
  int64_t K = 0, rows = 0, columns = 0;
  bool wrong = false;
  if (count != 5 || !read_threads(a[0], g.threads) || !tensors::read_matrix(a[1], g.x, g.M, K) ||
      !tensors::read_matrix(a[2], g.dy, rows, columns) || rows != g.M || columns != K ||
      g.dy.dtype != g.x.dtype || !read_int(a[3], g.size) || g.size < 1 || g.size > cpu::kMaxBlock ||
      K % g.size != 0 || !read_index(a[4], K, g.index, wrong))
    Py_RETURN_NONE;
  if (wrong) return refuse_index(K);
  g.blocks = K / g.size;
  const int64_t shape[] = {g.blocks, g.size, g.size};
  Results results;
  void* data = nullptr;
  if (!results.make(shape, 3, DType::f32, &data)) return nullptr;
  g.out = static_cast<float*>(data);
  return run([&] { cpu::block_rotate_grad(g); }) ? results.take(0) : nullptr;
}

// A tuple of numbers: c_0, c_1, ... of whole pairs, and one more.
bool read_series(PyObject* object, float* c, int64_t most, int64_t& pairs) {
  if (!PyTuple_CheckExact(object)) return false;
  const Py_ssize_t count = PyTuple_GET_SIZE(object);
  if (count < 5 || count > most || count % 2 == 0) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    double value;
    if (!read_double(PyTuple_GET_ITEM(object, i), value)) return false;
    c[i] = static_cast<float>(value);
  }
  pairs = count / 2;
  return true;
}

PyObject* skew_series(PyObject*, PyObject* const* a, Py_ssize_t count) {
  constexpr int64_t kMost = 33;
  cpu::SkewSeriesArgs g{};
  ConstMatrix upper;
  float c[kMost];
  if (count != 7 || !read_threads(a[0], g.threads) ||
      !tensors::read_matrix(a[1], upper, g.blocks, g.elements) || upper.dtype != DType::f32 ||
      !read_floats(a[1], g.upper, g.blocks, g.elements) || !read_array(a[2], g.rows, g.elements) ||
      !read_array(a[3], g.cols, g.elements) || !read_int(a[4], g.size) || g.size < 1 ||
      g.size > cpu::kMaxBlock || !read_series(a[5], c, kMost, g.pairs))
    Py_RETURN_NONE;
  for (int64_t e = 0; e < g.elements; ++e) {
    if (g.rows[e] < 0 || g.rows[e] >= g.size || g.cols[e] < 0 || g.cols[e] >= g.size)
      return PyErr_Format(PyExc_IndexError, "rows and cols name a place outside of a matrix of %lld rows",
                          static_cast<long long>(g.size));
  }
  if (a[6] != Py_None && !read_array(a[6], g.d, g.blocks * g.size * g.size, tensors::kFloat)) Py_RETURN_NONE;
  g.c = c;
  const int64_t matrices[] = {g.blocks, g.size, g.size}, elements[] = {g.blocks, g.elements};
  const bool backward = g.d != nullptr;
  Results results;
  void* data = nullptr;
  if (!results.make(backward ? elements : matrices, backward ? 2 : 3, DType::f32, &data)) return nullptr;
  g.out = static_cast<float*>(data);
  return run([&] { cpu::skew_series(g); }) ? results.take(0) : nullptr;
}

PyMethodDef methods[] = {
    {"block_rotate", fast(block_rotate), METH_FASTCALL, "(threads, x, R, index) -> y; None: not ordinary."},
    {"block_rotate_grad", fast(block_rotate_grad), METH_FASTCALL,
     "(threads, x, dy, size, index) -> dR in fp32; None: not ordinary."},
    {"skew_series", fast(skew_series), METH_FASTCALL,
     "(threads, upper, rows, cols, size, (c_0, ..., c_2n), gradient or None) -> R, or the gradient of upper, "
     "in "
     "fp32; None: not ordinary."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_block_rotate(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
  m.attr("block_rotate_max_size") = cpu::kMaxBlock;
}

}  // namespace peftkern
