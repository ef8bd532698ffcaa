// bottleneck_adapter's passes as one call each: tensors in, tensors out. None for a call that is not
// ordinary, or that nobody has looked at yet: its way is chosen in Python and left in the plans.
#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "bindings/plans.h"
#include "bindings/results.h"
#include "bindings/tensors.h"
#include "cpu/bottleneck/bottleneck.h"

namespace peftkern {
namespace {

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

// `present`: what a pass has of its own.
PlanKey key_of(PyObject* settings, int64_t pass, const cpu::Bottleneck& g, DType dtype, int64_t present) {
  PlanKey key;
  key.settings = settings;
  for (const ConstMatrix* v : {&g.up_bias, &g.gate, &g.out_scale})
    present = 2 * present + (v->data != nullptr);
  present = 2 * present + (g.drop_in.threshold != 0), present = 2 * present + (g.drop_out.threshold != 0);
  present = kActivations * present + static_cast<int64_t>(g.activation);
  key.facts = {
      pass, g.threads, static_cast<int64_t>(dtype), static_cast<int64_t>(g.down.dtype), present, 0, g.M, g.N,
      g.K,  g.R};
  return key;
}

// The kind of that name, if it can compute the products of this call; else a Python error and false.
bool read_products(PyObject* word, const cpu::Bottleneck& g, DType dtype, cpu::BaseKind& out) {
  if (!read_kind(word, g.M, dtype, &g.down, false, out)) return false;
  if (out == cpu::BaseKind::panels) return true;
  if (out == cpu::BaseKind::bf16 && g.down.dtype == DType::bf16 && g.gate.data == nullptr) return true;
  PyErr_Format(PyExc_ValueError, "a bottleneck's products cannot be computed by %U", word);
  return false;
}

struct ForwardCall {
  enum Args { kSettings, kThreads, kH, kResidual, kDown, kUp, kDownBias, kFirstOption };
  enum : int { kWantT = kFirstOption + kOptions, kCount };
  cpu::BottleneckForward g;
  tensors::View h;
  bool want_t;
  PlanKey key;

  bool read(PyObject* const* a, Py_ssize_t count) {
    if (count < kCount || !read_threads(a[kThreads], g.threads)) return false;
    if (!tensors::read_rows(a[kH], g.h, g.M, g.K, h) || a[kUp] == Py_None || a[kDown] == Py_None ||
        !tensors::read_matrix(a[kUp], g.up, g.N, g.R) || !read_sized(a[kDown], g.down, g.R, g.K))
      return false;
    const DType dtype = g.residual.dtype = g.h.dtype;
    if (g.up.dtype != g.down.dtype || !fits(g.down.dtype, dtype)) return false;
    int64_t M = g.M, N = g.N;
    tensors::View rows;
    if (a[kResidual] != Py_None && !tensors::read_rows(a[kResidual], g.residual, M, N, rows)) return false;
    if (M != g.M || N != g.N || g.residual.dtype != dtype || (a[kResidual] == Py_None && g.N != g.K))
      return false;
    if (!read_vector(a[kDownBias], g.down_bias, g.R) || !fits(g.down_bias.dtype, dtype) ||
        !read_options(a + kFirstOption, g, dtype))
      return false;
    want_t = a[kWantT] == Py_True;
    const int64_t present = 2 * (g.residual.data != nullptr) + (g.down_bias.data != nullptr);
    key = key_of(a[kSettings], PlanKey::kBottleneckForward, g, dtype, present);
    return true;
  }
  bool read_way(PyObject* word, cpu::BaseKind& out) const { return read_products(word, g, g.h.dtype, out); }
};

PyObject* forward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  ForwardCall call;
  const Plan* plan = call.read(a, count) ? plans.find(call.key) : nullptr;
  if (plan == nullptr) Py_RETURN_NONE;
  cpu::BottleneckForward& g = call.g;
  g.pairs = plan->kind == cpu::BaseKind::bf16;
  Results results;
  Matrix t;
  if (!make_rows(results, true, call.h, g.N, g.h.dtype, g.y) ||
      !make_matrix(results, call.want_t, g.M, g.R, DType::f32, t))
    return nothing();
  g.t = static_cast<float*>(t.data);
  if (!run([&] { cpu::bottleneck_forward(g); })) return nullptr;
  return call.want_t ? results.tuple() : results.take(0);
}

enum Need {
  kNeedH = 1,
  kNeedDown = 2,
  kNeedUp = 4,
  kNeedDownBias = 8,
  kNeedUpBias = 16,
  kNeedGate = 32,
  kNeedOutScale = 64
};

struct BackwardCall {
  enum Args { kSettings, kThreads, kDy, kH, kT, kDown, kUp, kFirstOption };
  enum : int { kThrough = kFirstOption + kOptions, kNeeds, kK, kR, kMatrixDType, kCount };
  cpu::BottleneckBackward g;
  tensors::View dy;
  int64_t needs;
  PlanKey key;

  bool need(int64_t bits) const { return (needs & bits) != 0; }

  bool read(PyObject* const* a, Py_ssize_t count) {
    if (count < kCount || !read_threads(a[kThreads], g.threads)) return false;
    if (!tensors::read_rows(a[kDy], g.dy, g.M, g.N, dy)) return false;
    DType matrices;
    if (!read_int(a[kNeeds], needs) || !read_int(a[kK], g.K) || !read_int(a[kR], g.R) || g.K < 0 || g.R < 0 ||
        !tensors::read_dtype(a[kMatrixDType], matrices) || !complete(a))
      return false;
    const DType dtype = g.h.dtype = g.dy.dtype;
    g.down.dtype = g.up.dtype = matrices;
    int64_t M = g.M, K = g.K;
    tensors::View h;
    if (a[kH] != Py_None && !tensors::read_rows(a[kH], g.h, M, K, h)) return false;
    g.through = a[kThrough] == Py_True;
    if (M != g.M || K != g.K || g.h.dtype != dtype || (g.through && g.N != g.K)) return false;
    if (!read_floats(a[kT], g.t, g.M, g.R) || !read_sized(a[kDown], g.down, g.R, g.K) ||
        !read_sized(a[kUp], g.up, g.N, g.R) || !read_options(a + kFirstOption, g, dtype))
      return false;
    if (g.down.dtype != matrices || g.up.dtype != matrices || !fits(matrices, dtype)) return false;
    key = key_of(a[kSettings], PlanKey::kBottleneckBackward, g, dtype, 2 * needs + g.through);
    return true;
  }
  bool read_way(PyObject* word, cpu::BaseKind& out) const { return read_products(word, g, g.dy.dtype, out); }

 private:
  // Whether everything is there that the needed gradients read.
  bool complete(PyObject* const* a) const {
    const auto there = [a](int i, bool read) { return !read || a[i] != Py_None; };
    return there(kH, need(kNeedDown)) && there(kT, needs != 0) && there(kDown, need(kNeedH)) &&
           there(kUp, need(~(kNeedUp | kNeedUpBias)));
  }
};

PyObject* backward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  BackwardCall call;
  const Plan* plan = call.read(a, count) ? plans.find(call.key) : nullptr;
  if (plan == nullptr) Py_RETURN_NONE;
  cpu::BottleneckBackward& g = call.g;
  g.pairs = plan->kind == cpu::BaseKind::bf16;
  Results results;
  if (!make_rows(results, call.need(kNeedH), call.dy, g.K, g.dy.dtype, g.dh) ||
      !make_matrix(results, call.need(kNeedDown), g.R, g.K, g.down.dtype, g.ddown) ||
      !make_matrix(results, call.need(kNeedUp), g.N, g.R, g.up.dtype, g.dup) ||
      !make_floats(results, call.need(kNeedDownBias), g.R, g.ddown_bias) ||
      !make_floats(results, call.need(kNeedUpBias), g.N, g.dup_bias) ||
      !make_floats(results, call.need(kNeedGate), g.M, g.dgate) ||
      !make_floats(results, call.need(kNeedOutScale), g.N, g.dout_scale))
    return nothing();
  return run([&] { cpu::bottleneck_backward(g); }) ? results.tuple() : nullptr;
}

PyMethodDef methods[] = {
    {"bottleneck_forward", fast(forward), METH_FASTCALL,
     "(settings, threads, h, residual, down, up, down_bias, up_bias, gate, out_scale, activation code, "
     "scaling, dropout_p, on_input, seed, want_t) -> y, or (y, t) if t is wanted; None: not known, or not "
     "ordinary."},
    {"bottleneck_forward_learn", fast(learn<ForwardCall>), METH_FASTCALL,
     "(what bottleneck_forward takes, kind) -> whether calls like this one are taken from now on."},
    {"bottleneck_backward", fast(backward), METH_FASTCALL,
     "(settings, threads, dy, h, t, down, up, up_bias, gate, out_scale, activation code, scaling, dropout_p, "
     "on_input, seed, through, needs, K, R, dtype of the matrices) -> (dh, ddown, dup, ddown_bias, dup_bias, "
     "dgate, dout_scale), one for each bit of needs; None as above."},
    {"bottleneck_backward_learn", fast(learn<BackwardCall>), METH_FASTCALL,
     "(what bottleneck_backward takes, kind) -> whether calls like this one are taken from now on."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_bottleneck_adapter(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace peftkern
