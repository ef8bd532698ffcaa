// lora_linear's passes as one call each: tensors in, tensors out. An entry returns None for a call that is
// not ordinary or that nobody has looked at yet; Python then takes its careful way, and leaves its choice
// with the entry's _learn. All that memory safety rests on is checked here at every call: no choice is stale.
#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "bindings/plans.h"
#include "bindings/results.h"
#include "bindings/tensors.h"
#include "cpu/lora/linear.h"
#include "peftkern/cpu.h"

namespace peftkern {
namespace {

using tensors::read_matrix;
using tensors::read_vector;

// --- reading arguments; false: not ours ---

// Scaling and dropout.
bool read_numbers(PyObject* scaling, PyObject* dropout_p, PyObject* seed, cpu::LoraLinear& g) {
  double s, p;
  if (!read_double(scaling, s) || !read_double(dropout_p, p) || !(p >= 0.0 && p < 1.0)) return false;
  g.scaling = static_cast<float>(s);
  if (p == 0.0) return true;
  if (!read_seed(seed, g.dropout.seed)) return false;
  g.dropout.threshold = static_cast<uint32_t>(p * 4294967296.0);
  g.kept_scale = static_cast<float>(1.0 / (1.0 - p));
  return true;
}

// (d, p_b, p_d, g_b, g_d), or None for none of them.
bool read_scales(PyObject* scales, cpu::LoraLinear& g) {
  if (scales == Py_None) return true;
  if (!PyTuple_CheckExact(scales) || PyTuple_GET_SIZE(scales) != 5) return false;
  ConstMatrix* const out[] = {&g.d, &g.p_b, &g.p_d, &g.g_b, &g.g_d};
  const int64_t sizes[] = {g.R, g.K, g.K, g.N, g.N};
  for (int i = 0; i < 5; ++i) {
    if (!read_vector(PyTuple_GET_ITEM(scales, i), *out[i], sizes[i])) return false;
  }
  return true;
}

bool scales_fit(const cpu::LoraLinear& g, DType activation) {
  for (const ConstMatrix* v : {&g.d, &g.p_b, &g.p_d, &g.g_b, &g.g_d})
    if (!fits(v->dtype, activation)) return false;
  return true;
}

PlanKey key_of(PyObject* settings, int64_t pass, const cpu::LoraLinear& g, DType dtype, DType adapter,
               int64_t present) {
  PlanKey key;
  key.settings = settings;
  for (const ConstMatrix* v : {&g.d, &g.p_b, &g.p_d, &g.g_b, &g.g_d})
    present = 2 * present + (v->data != nullptr);
  present = 2 * present + (g.dropout.threshold != 0);
  const int64_t strides = 2 * (g.weight.row == 1) + (g.weight.col == 1);
  key.facts = {
      pass, g.threads, static_cast<int64_t>(dtype), static_cast<int64_t>(adapter), present, strides, g.M, g.N,
      g.K,  g.R};
  return key;
}

// The scale of the operand of a base product, for Python.
PyObject* scale_of(PyObject* scales, bool transpose) {
  return scales == Py_None ? Py_None : PyTuple_GET_ITEM(scales, transpose ? 1 : 3);
}

// --- forward ---

enum ForwardArgs {
  kFSettings,
  kFThreads,
  kFX,
  kFBase,
  kFA,
  kFB,
  kFBias,
  kFScaling,
  kFP,
  kFSeed,
  kFScales,
  kFWantU,
  kFWantH,
  kFCount
};

struct ForwardCall {
  cpu::LoraLinearForward g;
  tensors::View x;
  bool want_u, want_h;
  PlanKey key;
};

bool read_forward(PyObject* const* a, Py_ssize_t count, ForwardCall& call) {
  cpu::LoraLinearForward& g = call.g;
  int64_t rank_of_B = 0;
  if (count < kFCount || !read_threads(a[kFThreads], g.threads)) return false;
  if (!tensors::read_rows(a[kFX], g.x, g.M, g.K, call.x)) return false;
  if (!read_matrix(a[kFB], g.B, g.N, rank_of_B)) return false;
  g.R = rank_of_B;
  if (a[kFA] == Py_None || !read_sized(a[kFA], g.A, g.R, g.K) || !read_sized(a[kFBase], g.weight, g.N, g.K))
    return false;
  const bool identity = a[kFBase] == Py_None;
  const DType dtype = g.x.dtype;
  if (identity ? g.N != g.K : g.weight.dtype != dtype) return false;
  if (g.A.dtype != g.B.dtype || !fits(g.A.dtype, dtype)) return false;
  if (!read_vector(a[kFBias], g.bias, g.N) || !fits(g.bias.dtype, dtype)) return false;
  if (!read_numbers(a[kFScaling], a[kFP], a[kFSeed], g) || !read_scales(a[kFScales], g) ||
      !scales_fit(g, dtype))
    return false;
  call.want_u = a[kFWantU] == Py_True, call.want_h = a[kFWantH] == Py_True;
  const int64_t present = 2 * identity + (g.bias.data != nullptr);
  call.key = key_of(a[kFSettings], PlanKey::kLoraForward, g, dtype, g.A.dtype, present);
  return true;
}

PyObject* forward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  ForwardCall call;
  if (!read_forward(a, count, call)) Py_RETURN_NONE;
  const Plan* plan = plans.find(call.key);
  if (plan == nullptr) Py_RETURN_NONE;
  cpu::LoraLinearForward& g = call.g;
  g.kind = plan->kind;
  Results results;
  Matrix u;
  const bool made = make_rows(results, true, call.x, g.N, g.x.dtype, g.y) &&
                    make_matrix(results, call.want_u, g.M, g.R, DType::f32, u) &&
                    make_matrix(results, call.want_h, g.M, g.N, g.x.dtype, g.h);
  if (!made) return PyErr_Occurred() != nullptr ? nullptr : Py_NewRef(Py_None);
  g.u = static_cast<float*>(u.data);
  PyObject* product = results.at(call.want_h ? 2 : 0);
  if (!prepare_product(g.kind, g.vendor, a[kFX], a[kFBase], true, scale_of(a[kFScales], true), product))
    return nullptr;
  if (!run([&] { cpu::lora_linear_forward(g); })) return nullptr;
  return call.want_u || call.want_h ? results.tuple() : results.take(0);
}

PyObject* forward_learn(PyObject*, PyObject* const* a, Py_ssize_t count) {
  ForwardCall call;
  if (count != kFCount + 1 || !read_forward(a, count, call)) Py_RETURN_FALSE;
  const cpu::LoraLinear& g = call.g;
  cpu::BaseKind kind;
  if (!read_kind(a[kFCount], g.M, g.x.dtype, a[kFBase] == Py_None ? nullptr : &g.weight,
                 g.p_b.data != nullptr, kind))
    return nullptr;
  plans.keep(call.key, kind);
  Py_RETURN_TRUE;
}

// --- backward ---

enum BackwardArgs {
  kBSettings,
  kBThreads,
  kBDy,
  kBX,
  kBU,
  kBH,
  kBBase,
  kBA,
  kBB,
  kBScaling,
  kBP,
  kBSeed,
  kBScales,
  kBNeeds,
  kBK,
  kBR,
  kBAdapterDType,
  kBCount
};
enum Need {
  kNeedX = 1,
  kNeedA = 2,
  kNeedB = 4,
  kNeedBias = 8,
  kNeedRank = 16,
  kNeedBaseIn = 32,
  kNeedDeltaIn = 64,
  kNeedBaseOut = 128,
  kNeedDeltaOut = 256
};

struct BackwardCall {
  cpu::LoraLinearBackward g;
  tensors::View dy;
  int64_t needs;
  DType adapter;
  PlanKey key;

  bool need(int64_t bits) const { return (needs & bits) != 0; }
};

// Whether everything is there that the needed gradients read.
bool complete(PyObject* const* a, const BackwardCall& call) {
  const bool dx = call.need(kNeedX | kNeedBaseIn), du = dx || call.need(kNeedA | kNeedDeltaIn | kNeedRank);
  const auto there = [a](int i, bool read) { return !read || a[i] != Py_None; };
  return there(kBX, call.need(kNeedA | kNeedDeltaIn | kNeedBaseIn)) &&
         there(kBA, dx || call.need(kNeedDeltaIn)) && there(kBB, du || call.need(kNeedDeltaOut)) &&
         there(kBH, call.need(kNeedBaseOut)) && there(kBU, call.need(kNeedB | kNeedRank | kNeedDeltaOut));
}

bool read_backward(PyObject* const* a, Py_ssize_t count, BackwardCall& call) {
  cpu::LoraLinearBackward& g = call.g;
  int64_t M, K;
  if (count < kBCount || !read_threads(a[kBThreads], g.threads)) return false;
  if (!tensors::read_rows(a[kBDy], g.dy, g.M, g.N, call.dy)) return false;
  if (!read_int(a[kBNeeds], call.needs) || !read_int(a[kBK], g.K) || !read_int(a[kBR], g.R) || g.K < 0 ||
      g.R < 0)
    return false;
  if (!tensors::read_dtype(a[kBAdapterDType], call.adapter) || !complete(a, call)) return false;
  const DType dtype = g.dy.dtype;
  tensors::View x;
  if (a[kBX] != Py_None &&
      (!tensors::read_rows(a[kBX], g.x, M, K, x) || M != g.M || K != g.K || g.x.dtype != dtype))
    return false;
  g.A.dtype = g.B.dtype = call.adapter, g.weight.dtype = g.h.dtype = dtype;
  if (!read_floats(a[kBU], g.u, g.M, g.R) || !read_sized(a[kBH], g.h, g.M, g.N) ||
      !read_sized(a[kBBase], g.weight, g.N, g.K) || !read_sized(a[kBA], g.A, g.R, g.K) ||
      !read_sized(a[kBB], g.B, g.N, g.R))
    return false;
  if (g.weight.dtype != dtype || g.h.dtype != dtype || g.A.dtype != call.adapter ||
      g.B.dtype != call.adapter || !fits(call.adapter, dtype))
    return false;
  const bool dx = call.need(kNeedX | kNeedBaseIn), identity = dx && a[kBBase] == Py_None;
  if (identity && g.N != g.K) return false;
  if (!read_numbers(a[kBScaling], a[kBP], a[kBSeed], g) || !read_scales(a[kBScales], g) ||
      !scales_fit(g, dtype))
    return false;
  call.key = key_of(a[kBSettings], PlanKey::kLoraBackward, g, dtype, call.adapter, 2 * call.needs + identity);
  return true;
}

PyObject* backward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  BackwardCall call;
  if (!read_backward(a, count, call)) Py_RETURN_NONE;
  const Plan* plan = plans.find(call.key);
  if (plan == nullptr) Py_RETURN_NONE;
  cpu::LoraLinearBackward& g = call.g;
  g.kind = plan->kind;
  const bool dx = call.need(kNeedX | kNeedBaseIn);
  Results results;
  const bool made = make_rows(results, dx, call.dy, g.K, g.dy.dtype, g.dx) &&
                    make_matrix(results, call.need(kNeedA), g.R, g.K, call.adapter, g.dA) &&
                    make_matrix(results, call.need(kNeedB), g.N, g.R, call.adapter, g.dB) &&
                    make_floats(results, call.need(kNeedBias), g.N, g.dbias) &&
                    make_floats(results, call.need(kNeedRank), g.R, g.dd) &&
                    make_floats(results, call.need(kNeedBaseIn), g.K, g.dp_b) &&
                    make_floats(results, call.need(kNeedDeltaIn), g.K, g.dp_d) &&
                    make_floats(results, call.need(kNeedBaseOut), g.N, g.dg_b) &&
                    make_floats(results, call.need(kNeedDeltaOut), g.N, g.dg_d);
  if (!made) return PyErr_Occurred() != nullptr ? nullptr : Py_NewRef(Py_None);
  if (dx && !prepare_product(g.kind, g.vendor, a[kBDy], a[kBBase], false, scale_of(a[kBScales], false),
                             results.at(0)))
    return nullptr;
  if (!run([&] { cpu::lora_linear_backward(g); })) return nullptr;
  if (!call.need(kNeedX)) results.drop(0);
  return results.tuple();
}

PyObject* backward_learn(PyObject*, PyObject* const* a, Py_ssize_t count) {
  BackwardCall call;
  if (count != kBCount + 1 || !read_backward(a, count, call)) Py_RETURN_FALSE;
  const cpu::LoraLinearBackward& g = call.g;
  const bool dx = call.need(kNeedX | kNeedBaseIn);
  cpu::BaseKind kind = cpu::BaseKind::vendor;
  if (dx && !read_kind(a[kBCount], g.M, g.dy.dtype, a[kBBase] == Py_None ? nullptr : &g.weight,
                       g.g_b.data != nullptr, kind))
    return nullptr;
  plans.keep(call.key, kind);
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {
    {"tensors_set_up", tensors::set_up, METH_VARARGS,
     "What the entries that take tensors need of torch, once."},
    {"lora_linear_forward", fast(forward), METH_FASTCALL,
     "(settings, threads, x, base, A, B, bias, scaling, dropout_p, seed, scales, want_u, want_h) -> y, or "
     "(y, u, h) "
     "if one of the two is wanted; None: not known, or not ordinary."},
    {"lora_linear_forward_learn", fast(forward_learn), METH_FASTCALL,
     "(what lora_linear_forward takes, kind) -> whether calls like this one are taken from now on."},
    {"lora_linear_backward", fast(backward), METH_FASTCALL,
     "(settings, threads, dy, x, u, h, base, A, B, scaling, dropout_p, seed, scales, needs, K, R, adapter "
     "dtype) -> "
     "(dx, dA, dB, dbias, dd, dp_b, dp_d, dg_b, dg_d), one for each bit of needs; None as above."},
    {"lora_linear_backward_learn", fast(backward_learn), METH_FASTCALL,
     "(what lora_linear_backward takes, kind) -> whether calls like this one are taken from now on."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_lora_linear(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace peftkern
