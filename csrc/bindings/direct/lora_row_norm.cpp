// lora_row_norm on the CPU as one call: tensors in, a tensor out. None for a call that is not ordinary.
#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "bindings/results.h"
#include "bindings/tensors.h"
#include "peftkern/cpu.h"

namespace peftkern {
namespace {

enum Args { kThreads, kKind, kWeight, kA, kB, kScaling, kCount };

bool read(PyObject* const* a, Py_ssize_t count, cpu::LoraRowNormArgs& g, Base& base) {
  int64_t ranks = 0;
  double scaling = 0;
  DType dtype = DType::f32;  // a quantised weight goes with adapters of any
  if (count != kCount || !read_threads(a[kThreads], g.threads) || !read_double(a[kScaling], scaling) ||
      !tensors::read_matrix(a[kA], g.a, g.R, g.K) || !tensors::read_matrix(a[kB], g.b, g.N, ranks))
    return false;
  tensors::View weight;
  if (tensors::read(a[kWeight], weight)) weight.dtype(dtype);
  if (!base.read(a[kKind], a[kWeight], g.N, g.K, dtype)) return false;
  g.scaling = static_cast<float>(scaling);
  g.w = base.weight, g.quantised = base.coded();
  return (base.kind == Base::kQuantised || (base.kind == Base::kDense && fits(g.a.dtype, dtype))) &&
         ranks == g.R && g.a.dtype == g.b.dtype;
}

PyObject* lora_row_norm(PyObject*, PyObject* const* a, Py_ssize_t count) {
  cpu::LoraRowNormArgs g{};
  Base base;
  if (!read(a, count, g, base)) Py_RETURN_NONE;
  Results results;
  if (!make_floats(results, true, g.N, g.out)) return nullptr;
  return run([&] { cpu::lora_row_norm(g); }) ? results.take(0) : nullptr;
}

PyMethodDef methods[] = {{"lora_row_norm", fast(lora_row_norm), METH_FASTCALL,
                          "(threads, kind, weight, A, B, scaling) -> norms in fp32; None: not ordinary."},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_lora_row_norm(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace peftkern
