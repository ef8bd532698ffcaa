// bottleneck_adapter's passes as one call each: tensors in, tensors out. None for a call that is not
// ordinary.
#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "bindings/results.h"
#include "bindings/tensors.h"
#include "cpu/bottleneck/bottleneck.h"

namespace peftkern {
namespace {

using tensors::read_matrix;
using tensors::read_vector;

// up_bias, gate, out_scale, activation, scaling, dropout_p, on_input, seed: what both passes take in a row,
// after the matrices.
constexpr int kOptions = 8;
bool read_options(PyObject* const* a, cpu::Bottleneck& g, DType activation) {
  int64_t code;
  Dropout drop;
  float kept;
  if (!read_vector(a[0], g.up_bias, g.N) || !read_vector(a[1], g.gate, g.M) ||
      !read_vector(a[2], g.out_scale, g.N) || !read_int(a[3], code) || code < 0 || code >= kActivations ||
      !read_numbers(a[4], a[5], g.scaling, drop.threshold, kept) ||
      (drop.threshold != 0 && !read_seed(a[7], drop.seed)))
    return false;
  for (const ConstMatrix* v : {&g.up_bias, &g.gate, &g.out_scale})
    if (!fits(v->dtype, activation)) return false;
  g.activation = static_cast<Activation>(code);
  const bool on_input = a[6] == Py_True;
  (on_input ? g.drop_in : g.drop_out) = drop;
  (on_input ? g.kept_in : g.kept_out) = kept;
  return true;
}

bool read_matrices(PyObject* down, PyObject* up, cpu::Bottleneck& g, DType activation) {
  return down != Py_None && up != Py_None && read_matrix(down, g.down, g.R, g.K) &&
         read_sized(up, g.up, g.N, g.R) && g.up.dtype == g.down.dtype && fits(g.down.dtype, activation);
}

// (threads, h, residual, down, up, down_bias, options) -> (y, t)
PyObject* forward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  cpu::BottleneckForward g;
  int64_t columns = 0, ranks = 0;
  if (count != 6 + kOptions || !read_threads(a[0], g.threads) || a[1] == Py_None || a[4] == Py_None ||
      !read_matrix(a[1], g.h, g.M, columns) || !read_matrix(a[4], g.up, g.N, ranks))
    Py_RETURN_NONE;
  const DType dtype = g.residual.dtype = g.h.dtype;
  if (!read_matrices(a[3], a[4], g, dtype) || g.K != columns || !read_sized(a[2], g.residual, g.M, g.N) ||
      g.residual.dtype != dtype || (a[2] == Py_None && g.N != g.K) || !read_vector(a[5], g.down_bias, g.R) ||
      !fits(g.down_bias.dtype, dtype) || !read_options(a + 6, g, dtype))
    Py_RETURN_NONE;
  Results results;
  Matrix t;
  if (!make_matrix(results, true, g.M, g.N, dtype, g.y) ||
      !make_matrix(results, true, g.M, g.R, DType::f32, t))
    return nullptr;
  g.t = static_cast<float*>(t.data);
  return run([&] { cpu::bottleneck_forward(g); }) ? results.tuple() : nullptr;
}

enum Need { kH = 1, kDown = 2, kUp = 4, kDownBias = 8, kUpBias = 16, kGate = 32, kOutScale = 64 };

// (threads, dy, h, t, down, up, options, through, needs) -> (dh, ddown, ...), one for each bit of needs
PyObject* backward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  cpu::BottleneckBackward g;
  int64_t needs = 0;
  if (count != 8 + kOptions || !read_threads(a[0], g.threads) || a[1] == Py_None || a[3] == Py_None ||
      !read_matrix(a[1], g.dy, g.M, g.N) || !read_int(a[7 + kOptions], needs))
    Py_RETURN_NONE;
  const DType dtype = g.h.dtype = g.dy.dtype;
  const auto need = [needs](int64_t bit) { return (needs & bit) != 0; };
  g.through = a[6 + kOptions] == Py_True;
  if (!read_matrices(a[4], a[5], g, dtype) || (g.through && g.N != g.K) || !read_sized(a[2], g.h, g.M, g.K) ||
      g.h.dtype != dtype || (a[2] == Py_None && need(kDown)) || !read_floats(a[3], g.t, g.M, g.R) ||
      !read_options(a + 6, g, dtype))
    Py_RETURN_NONE;
  const DType matrices = g.down.dtype;
  Results results;
  if (!make_matrix(results, need(kH), g.M, g.K, dtype, g.dh) ||
      !make_matrix(results, need(kDown), g.R, g.K, matrices, g.ddown) ||
      !make_matrix(results, need(kUp), g.N, g.R, matrices, g.dup) ||
      !make_floats(results, need(kDownBias), g.R, g.ddown_bias) ||
      !make_floats(results, need(kUpBias), g.N, g.dup_bias) ||
      !make_floats(results, need(kGate), g.M, g.dgate) ||
      !make_floats(results, need(kOutScale), g.N, g.dout_scale))
    return nullptr;
  return run([&] { cpu::bottleneck_backward(g); }) ? results.tuple() : nullptr;
}

PyMethodDef methods[] = {{"bottleneck_forward", fast(forward), METH_FASTCALL,
                          "(threads, h, residual, down, up, down_bias, up_bias, gate, out_scale, activation "
                          "code, scaling, dropout_p, "
                          "on_input, seed) -> (y, t); None: not ordinary."},
                         {"bottleneck_backward", fast(backward), METH_FASTCALL,
                          "(threads, dy, h, t, down, up, up_bias, gate, out_scale, activation code, scaling, "
                          "dropout_p, on_input, seed, "
                          "through, needs) -> (dh, ddown, dup, ddown_bias, dup_bias, dgate, dout_scale), "
                          "None where a bit of needs is not "
                          "set; None: not ordinary."},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_bottleneck_adapter(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace peftkern
