// bottleneck_adapter's passes on a GPU as one call each: tensors in, tensors out, every kernel started on one
// stream.
#include "cuda/bottleneck/bottleneck.h"

#include "bindings/cuda/pass.h"

namespace peftkern {
namespace {

// What both passes take, in this order.
enum SharedArgs {
  kDown,
  kUp,
  kUpBias,
  kGate,
  kOutScale,
  kActivation,
  kScaling,
  kP,
  kOnInput,
  kSeed,
  kSharedCount
};

bool read_floats_of(PyObject* object, const float*& out, int64_t size, const Here& here) {
  ConstMatrix v;
  if (!read_gapless(object, v, size, here.device) || v.dtype != DType::f32) return false;
  out = static_cast<const float*>(v.data);
  return true;
}

bool read_bias(PyObject* object, ConstMatrix& out, int64_t size, DType dtype, const Here& here) {
  return read_gapless(object, out, size, here.device) && fits(out.dtype, dtype);
}

// M and one of N and K are known.
bool read_shared(PyObject* const* a, const Here& here, DType dtype, ConstMatrix& up_bias,
                 cuda::BottleneckPass& g) {
  const tensors::Device where = here.device;
  if (a[kDown] == Py_None || a[kUp] == Py_None || !tensors::read_matrix(a[kDown], g.down, g.R, g.K, where) ||
      !read_sized(a[kUp], g.up, g.N, g.R, where) || g.down.dtype != g.up.dtype || !fits(g.up.dtype, dtype))
    return false;
  cuda::DeviceDropout drop;
  int64_t code;
  if (!read_bias(a[kUpBias], up_bias, g.N, dtype, here) || !read_floats_of(a[kGate], g.gate, g.M, here) ||
      !read_floats_of(a[kOutScale], g.out_scale, g.N, here) || !read_int(a[kActivation], code) || code < 0 ||
      code >= kActivations || !read_numbers(a[kScaling], a[kP], g.scaling, drop.threshold, drop.keep_scale))
    return false;
  if (drop.threshold != 0 && !read_array(a[kSeed], drop.seed, 1, tensors::kInt, where)) return false;
  g.activation = static_cast<Activation>(code);
  (a[kOnInput] == Py_True ? g.drop_in : g.drop_out) = drop;
  g.arch = here.arch, g.stream = here.stream;
  return true;
}

// --- forward ---

enum ForwardArgs { kFHere, kFH, kFResidual, kFDownBias, kFShared, kFCount = kFShared + kSharedCount };

bool read_forward(PyObject* const* a, Py_ssize_t count, Here& here, cuda::BottleneckForward& g) {
  int64_t columns, rows, ranks;
  if (count != kFCount || !here.read(a[kFHere], a[kFH]) ||
      !read_adjacent(a[kFH], g.h, g.M, columns, here.device) || a[kFShared + kUp] == Py_None ||
      !tensors::read_matrix(a[kFShared + kUp], g.up, g.N, ranks, here.device) ||
      !read_shared(a + kFShared, here, g.h.dtype, g.up_bias, g) || g.K != columns)
    return false;
  return a[kFResidual] != Py_None && read_adjacent(a[kFResidual], g.residual, rows, columns, here.device) &&
         rows == g.M && columns == g.N && g.residual.dtype == g.h.dtype &&
         read_bias(a[kFDownBias], g.down_bias, g.R, g.h.dtype, here);
}

PyObject* forward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  Here here;
  cuda::BottleneckForward g{};
  if (!read_forward(a, count, here, g)) Py_RETURN_NONE;
  Results results(here.device), held(here.device);
  Matrix t;
  if (!make_matrix(results, true, g.M, g.N, g.h.dtype, g.y) ||
      !make_matrix(results, true, g.M, g.R, DType::f32, t))
    return nullptr;
  g.t = static_cast<float*>(t.data);
  const int64_t floats = cuda::bottleneck_forward_floats(g);
  if (!make_floats(held, floats > 0, floats, g.scratch)) return nullptr;
  if (!run([&] { check("bottleneck_adapter", cuda::bottleneck_forward(g)); })) return nullptr;
  return results.tuple();
}

// --- backward ---

enum BackwardArgs {
  kBHere,
  kBDy,
  kBH,
  kBT,
  kBWeights,
  kBShared,
  kBThrough = kBShared + kSharedCount,
  kBRaw,
  kBNeedH,
  kBNeedDown,
  kBNeedUp,
  kBNeedDt,
  kBNeedSums,
  kBNeedGate,
  kBCount
};

bool read_backward(PyObject* const* a, Py_ssize_t count, Here& here, cuda::BottleneckBackward& g) {
  if (count != kBCount || !here.read(a[kBHere], a[kBDy]) ||
      !read_adjacent(a[kBDy], g.dy, g.M, g.N, here.device) ||
      !read_shared(a + kBShared, here, g.dy.dtype, g.up_bias, g))
    return false;
  g.through = a[kBThrough] == Py_True, g.raw = a[kBRaw] == Py_True;
  if (g.through && g.N != g.K) return false;
  if (a[kBNeedDown] == Py_True) {
    int64_t M, K;
    if (a[kBH] == Py_None || !read_adjacent(a[kBH], g.h, M, K, here.device) || M != g.M || K != g.K ||
        g.h.dtype != g.dy.dtype)
      return false;
  }
  return a[kBT] != Py_None && read_floats(a[kBT], g.t, g.M, g.R, here.device) &&
         read_floats_of(a[kBWeights], g.weights, g.M, here);
}

PyObject* backward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  Here here;
  cuda::BottleneckBackward g{};
  if (!read_backward(a, count, here, g)) Py_RETURN_NONE;
  Results results(here.device), held(here.device);
  Matrix dt;
  if (!make_matrix(results, a[kBNeedH] == Py_True, g.M, g.K, g.dy.dtype, g.dh) ||
      !make_matrix(results, a[kBNeedDown] == Py_True, g.R, g.K, g.down.dtype, g.ddown) ||
      !make_matrix(results, a[kBNeedUp] == Py_True, g.N, g.R, g.raw ? DType::f32 : g.up.dtype, g.dup) ||
      !make_matrix(results, a[kBNeedDt] == Py_True, g.M, g.R, DType::f32, dt) ||
      !make_floats(results, a[kBNeedSums] == Py_True, g.N, g.sums) ||
      !make_floats(results, a[kBNeedGate] == Py_True, g.M, g.dgate))
    return nullptr;
  g.dt = static_cast<float*>(dt.data);
  const int64_t floats = cuda::bottleneck_backward_floats(g);
  if (!make_floats(held, floats > 0, floats, g.scratch)) return nullptr;
  if (g.M == 0 || g.N == 0 || g.K == 0) {  // nothing to sum, and no kernel for it
    for (int i = 0; i < results.count(); ++i)
      if (results.at(i) != nullptr && !fill_with_zeros(results.at(i))) return nullptr;
  }
  if (!run([&] { check("bottleneck_adapter", cuda::bottleneck_backward(g)); })) return nullptr;
  return results.tuple();
}

PyMethodDef methods[] = {
    {"cuda_bottleneck_forward", fast(forward), METH_FASTCALL,
     "(here, h, residual, down_bias, down, up, up_bias, gate, out_scale, activation code, scaling, "
     "dropout_p, "
     "on_input, seed) -> (y, t)."},
    {"cuda_bottleneck_backward", fast(backward), METH_FASTCALL,
     "(here, dy, h, t, weights, down, up, up_bias, gate, out_scale, activation code, scaling, dropout_p, "
     "on_input, seed, through, raw, need_h, need_down, need_up, need_dt, need_sums, need_gate) -> (dh, "
     "ddown, "
     "dup, dt, sums, dgate), None where not needed; csrc/cuda/bottleneck/bottleneck.h says what is raw."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool bind_cuda_bottleneck_adapter(PyObject* module) {
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace peftkern
