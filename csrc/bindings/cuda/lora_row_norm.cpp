// lora_row_norm on a GPU as one call.
#include "bindings/cuda/pass.h"

namespace peftkern {
namespace {

enum Args { kHere, kWeight, kA, kB, kScaling, kCount };

bool read(PyObject* const* a, Py_ssize_t count, Here& here, cuda::LoraRowNormArgs& g) {
  int64_t K;
  double scaling;
  if (count != kCount || !here.read(a[kHere], a[kWeight]) ||
      !read_adjacent(a[kWeight], g.w, g.N, g.K, here.device) ||
      !tensors::read_matrix(a[kA], g.a, g.R, K, here.device) || K != g.K)
    return false;
  if (!read_double(a[kScaling], scaling) || a[kB] == Py_None ||
      !read_sized(a[kB], g.b, g.N, g.R, here.device))
    return false;
  g.scaling = static_cast<float>(scaling), g.stream = here.stream, g.dependent = here.arch >= 90;
  return g.a.dtype == g.b.dtype && fits(g.a.dtype, g.w.dtype);
}

PyObject* row_norm(PyObject*, PyObject* const* a, Py_ssize_t count) {
  Here here;
  cuda::LoraRowNormArgs g{};
  if (!read(a, count, here, g)) Py_RETURN_NONE;
  Results results(here.device), held(here.device);
  const int64_t partials = cuda::lora_row_norm_partials(g.N, g.K, g.R);
  if (!make_floats(results, true, g.N, g.out) || !make_floats(held, partials > 0, partials, g.partial))
    return nullptr;
  if (!run([&] { check("lora_row_norm", cuda::lora_row_norm(g)); })) return nullptr;
  return results.take(0);
}

PyMethodDef methods[] = {
    {"cuda_lora_row_norm", fast(row_norm), METH_FASTCALL, "(here, weight, A, B, scaling) -> the norms."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool bind_cuda_lora_row_norm(PyObject* module) {
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace peftkern
