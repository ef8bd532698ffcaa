// lora_linear's passes on a GPU as one call each: tensors in, tensors out, every kernel started on one
// stream.
#include "cuda/lora_linear/lora_linear.h"

#include "bindings/cuda/pass.h"

namespace peftkern {
namespace {

// What both passes take, in this order; the vectors as a tuple, one for each place (peftkern/equation.py).
// The weight of a forward pass may be a tuple, (kind, tensors), of one in codes.
enum BranchArgs { kWeight, kA, kB, kScaling, kP, kSeed, kScales, kBranchCount };

bool read_weight(PyObject* object, tensors::Device where, DType dtype, cuda::LoraPass& g) {
  return read_sized(object, g.w, g.N, g.K, where) &&
         (object == Py_None || (g.w.dtype == dtype && (g.w.row == 1 || g.w.col == 1)));
}

// But for the weight.
bool read_branch(PyObject* const* a, const Here& here, DType dtype, cuda::LoraPass& g) {
  const tensors::Device where = here.device;
  if (!read_sized(a[kA], g.a, g.R, g.K, where) || !read_sized(a[kB], g.b, g.N, g.R, where)) return false;
  if (a[kA] == Py_None || a[kB] == Py_None || g.a.dtype != g.b.dtype || !fits(g.a.dtype, dtype)) return false;
  if (!read_numbers(a[kScaling], a[kP], g.scaling, g.dropout.threshold, g.dropout.keep_scale)) return false;
  if (g.dropout.threshold != 0 && !read_array(a[kSeed], g.dropout.seed, 1, tensors::kInt, where))
    return false;
  if (!PyTuple_CheckExact(a[kScales]) || PyTuple_GET_SIZE(a[kScales]) != 5) return false;
  const float** const out[] = {&g.scales.d, &g.scales.p_b, &g.scales.p_d, &g.scales.g_b, &g.scales.g_d};
  const int64_t sizes[] = {g.R, g.K, g.K, g.N, g.N};
  for (int i = 0; i < 5; ++i) {
    ConstMatrix v;
    if (!read_gapless(PyTuple_GET_ITEM(a[kScales], i), v, sizes[i], where) || v.dtype != DType::f32)
      return false;
    *out[i] = static_cast<const float*>(v.data);
  }
  g.arch = here.arch, g.multiprocessors = here.multiprocessors, g.stream = here.stream;
  return true;
}

// Memory for a pass, which `held` holds. False with a Python error.
bool provide(const cuda::PassMemory& memory, Here& here, Results& held, cuda::LoraPass& g) {
  return make_floats(held, memory.floats > 0, memory.floats, g.scratch) &&
         here.counters(memory.counters, held, g.counters);
}

// --- forward ---

enum ForwardArgs { kFHere, kFX, kFBias, kFBranch, kFCount = kFBranch + kBranchCount };

// `codes`: what g.codes points to, if it does.
bool read_forward(PyObject* const* a, Py_ssize_t count, Here& here, cuda::LoraForward& g, Quantised& codes) {
  if (count != kFCount || !here.read(a[kFHere], a[kFX]) || !read_adjacent(a[kFX], g.x, g.M, g.K, here.device))
    return false;
  ConstMatrix b, bias;
  PyObject* weight = a[kFBranch + kWeight];
  if (!tensors::read_matrix(a[kFBranch + kB], b, g.N, g.R, here.device) || weight == Py_None ||
      !read_branch(a + kFBranch, here, g.x.dtype, g) || g.scales.p_b != nullptr)
    return false;
  if (!PyTuple_CheckExact(weight)) {
    if (!read_weight(weight, here.device, g.x.dtype, g)) return false;
  } else {
    if (PyTuple_GET_SIZE(weight) != 2 ||
        !read_quantised(PyTuple_GET_ITEM(weight, 0), PyTuple_GET_ITEM(weight, 1), g.N, g.K, codes,
                        here.device))
      return false;
    g.codes = &codes;
  }
  if (!read_gapless(a[kFBias], bias, g.N, here.device) || !fits(bias.dtype, g.x.dtype)) return false;
  g.bias = bias.data, g.bias_dtype = bias.dtype;
  return true;
}

PyObject* forward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  Here here;
  cuda::LoraForward g{};
  Quantised codes;
  if (!read_forward(a, count, here, g, codes)) Py_RETURN_NONE;
  Results results(here.device), held(here.device);
  Matrix u;
  if (!make_matrix(results, true, g.M, g.N, g.x.dtype, g.y) ||
      !make_matrix(results, true, g.M, g.R, DType::f32, u))
    return nullptr;
  g.u = static_cast<float*>(u.data);
  if (!provide(cuda::lora_forward_memory(g), here, held, g)) return nullptr;
  if (!run([&] { check("lora_linear", cuda::lora_forward(g)); })) return nullptr;
  return results.tuple();
}

// --- backward ---

enum BackwardArgs {
  kBHere,
  kBDy,
  kBX,
  kBU,
  kBBranch,
  kBNeedX = kBBranch + kBranchCount,
  kBNeedA,
  kBNeedB,
  kBNeedBias,
  kBNeedRank,
  kBCount
};

bool read_backward(PyObject* const* a, Py_ssize_t count, Here& here, cuda::LoraBackward& g) {
  if (count != kBCount || !here.read(a[kBHere], a[kBDy]) ||
      !read_adjacent(a[kBDy], g.dy, g.M, g.N, here.device))
    return false;
  g.need_x = a[kBNeedX] == Py_True, g.need_A = a[kBNeedA] == Py_True, g.need_B = a[kBNeedB] == Py_True;
  g.need_bias = a[kBNeedBias] == Py_True;
  ConstMatrix A;
  if (!tensors::read_matrix(a[kBBranch + kA], A, g.R, g.K, here.device) ||
      !read_branch(a + kBBranch, here, g.dy.dtype, g) ||
      !read_weight(a[kBBranch + kWeight], here.device, g.dy.dtype, g))
    return false;
  if (g.need_x && (a[kBBranch + kWeight] == Py_None || g.scales.g_b != nullptr)) return false;
  if (g.need_A) {
    int64_t M, K;
    if (!read_adjacent(a[kBX], g.x, M, K, here.device) || M != g.M || K != g.K || g.x.dtype != g.dy.dtype)
      return false;
  }
  return read_floats(a[kBU], g.u, g.M, g.R, here.device) && (!g.need_B || a[kBU] != Py_None);
}

PyObject* backward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  Here here;
  cuda::LoraBackward g{};
  if (!read_backward(a, count, here, g)) Py_RETURN_NONE;
  Results results(here.device), held(here.device);
  Matrix dv;
  if (!make_matrix(results, g.need_x, g.M, g.K, g.dy.dtype, g.dx) ||
      !make_matrix(results, g.need_A, g.R, g.K, g.a.dtype, g.dA) ||
      !make_matrix(results, g.need_B, g.N, g.R, g.a.dtype, g.dB) ||
      !make_floats(results, g.need_bias, g.N, g.dbias) ||
      !make_matrix(results, a[kBNeedRank] == Py_True, g.M, g.R, DType::f32, dv))
    return nullptr;
  g.dv = static_cast<float*>(dv.data);
  if (!provide(cuda::lora_backward_memory(g), here, held, g)) return nullptr;
  if (g.M == 0 || g.N == 0 || g.K == 0) {  // nothing to sum, and no kernel for it
    for (const Results* made : {&results, &held})
      for (int i = 0; i < made->count(); ++i)
        if (made->at(i) != nullptr && !fill_with_zeros(made->at(i))) return nullptr;
  }
  if (!run([&] { check("lora_linear", cuda::lora_backward(g)); })) return nullptr;
  return results.tuple();
}

PyMethodDef methods[] = {
    {"cuda_lora_linear_forward", fast(forward), METH_FASTCALL,
     "(here, x, bias, weight, A, B, scaling, dropout_p, seed, scales) -> (y, u)."},
    {"cuda_lora_linear_backward", fast(backward), METH_FASTCALL,
     "(here, dy, x, u, weight, A, B, scaling, dropout_p, seed, scales, need_x, need_A, need_B, need_bias, "
     "need_dv) -> (dx, dA, dB, dbias, dv), None where not needed."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool bind_cuda_lora_linear(PyObject* module) {
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace peftkern
