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

// A vector for each place (peftkern/equation.py), or None for none of them.
bool read_scales(PyObject* scales, cpu::LoraLinear& g, DType activation) {
  if (scales == Py_None) return true;
  if (!PyTuple_CheckExact(scales) || PyTuple_GET_SIZE(scales) != 5) return false;
  ConstMatrix* const out[] = {&g.d, &g.p_b, &g.p_d, &g.g_b, &g.g_d};
  const int64_t sizes[] = {g.R, g.K, g.K, g.N, g.N};
  for (int i = 0; i < 5; ++i) {
    if (!read_vector(PyTuple_GET_ITEM(scales, i), *out[i], sizes[i]) || !fits(out[i]->dtype, activation))
      return false;
  }
  return true;
}

// What both passes end with: scaling, dropout_p, seed, scales.
bool read_branch(PyObject* const* a, cpu::LoraLinear& g, DType activation) {
  return read_numbers(a[0], a[1], g.scaling, g.dropout.threshold, g.kept_scale) &&
         (g.dropout.threshold == 0 || read_seed(a[2], g.dropout.seed)) && read_scales(a[3], g, activation);
}

// `present`: what else a pass has.
PlanKey key_of(PyObject* settings, int64_t pass, const cpu::LoraLinear& g, const Base& base, DType dtype,
               int64_t present) {
  PlanKey key;
  key.settings = settings;
  present = 256 * present + base.which();
  for (const ConstMatrix* v : {&g.d, &g.p_b, &g.p_d, &g.g_b, &g.g_d})
    present = 2 * present + (v->data != nullptr);
  present = 2 * present + (g.dropout.threshold != 0);
  key.facts = {pass,
               g.threads,
               static_cast<int64_t>(dtype),
               static_cast<int64_t>(g.A.dtype),
               present,
               base.strides(),
               g.M,
               g.N,
               g.K,
               g.R};
  return key;
}

// Whether a branch of such arguments can be computed by products of bf16.
bool in_bf16(const cpu::LoraLinear& g, DType dtype) {
  return dtype == DType::bf16 && g.A.dtype == DType::bf16 && g.d.data == nullptr && g.p_d.data == nullptr &&
         g.g_d.data == nullptr && cpu::base_gemm_bf16_usable();
}

// The scale of the operand of a base product, for Python.
PyObject* scale_of(PyObject* scales, bool transpose) {
  return scales == Py_None ? Py_None : PyTuple_GET_ITEM(scales, transpose ? 1 : 3);
}

// --- forward ---

struct ForwardCall {
  enum Args {
    kSettings,
    kThreads,
    kX,
    kKind,
    kWeight,
    kA,
    kB,
    kBias,
    kScaling,
    kP,
    kSeed,
    kScales,
    kWantU,
    kWantH,
    kCount
  };
  cpu::LoraLinearForward g;
  Base base;
  tensors::View x;
  bool want_u, want_h;
  PlanKey key;

  bool read(PyObject* const* a, Py_ssize_t count) {
    if (count < kCount || !read_threads(a[kThreads], g.threads)) return false;
    if (!tensors::read_rows(a[kX], g.x, g.M, g.K, x) || !read_matrix(a[kB], g.B, g.N, g.R)) return false;
    const DType dtype = g.x.dtype;
    if (a[kA] == Py_None || !read_sized(a[kA], g.A, g.R, g.K) ||
        !base.read(a[kKind], a[kWeight], g.N, g.K, dtype) || base.kind == Base::kNone)
      return false;
    g.weight = base.weight, g.quantised = base.coded();
    if (g.A.dtype != g.B.dtype || !fits(g.A.dtype, dtype)) return false;
    if (!read_vector(a[kBias], g.bias, g.N) || !fits(g.bias.dtype, dtype)) return false;
    if (!read_branch(a + kScaling, g, dtype)) return false;
    want_u = a[kWantU] == Py_True, want_h = a[kWantH] == Py_True;
    key = key_of(a[kSettings], PlanKey::kLoraForward, g, base, dtype, g.bias.data != nullptr);
    return true;
  }
  bool read_way(PyObject* word, cpu::BaseKind& out) const {
    return base.read_way(word, g.M, g.x.dtype, g.p_b.data != nullptr, out);
  }
  bool takes_pairs() const { return in_bf16(g, g.x.dtype); }
};

PyObject* forward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  ForwardCall call;
  const Plan* plan = call.read(a, count) ? plans.find(call.key) : nullptr;
  if (plan == nullptr) Py_RETURN_NONE;
  cpu::LoraLinearForward& g = call.g;
  g.kind = plan->kind, g.pairs = plan->pairs;
  Results results;
  Matrix u;
  if (!make_rows(results, true, call.x, g.N, g.x.dtype, g.y) ||
      !make_matrix(results, call.want_u, g.M, g.R, DType::f32, u) ||
      !make_matrix(results, call.want_h, g.M, g.N, g.x.dtype, g.h))
    return nothing();
  g.u = static_cast<float*>(u.data);
  PyObject* product = results.at(call.want_h ? 2 : 0);
  if (!prepare_product(g.kind, g.vendor, a[call.kX], a[call.kWeight], g.quantised != nullptr, true,
                       scale_of(a[call.kScales], true), product))
    return nullptr;
  if (!run([&] { cpu::lora_linear_forward(g); })) return nullptr;
  return call.want_u || call.want_h ? results.tuple() : results.take(0);
}

// --- backward ---

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
  enum Args {
    kSettings,
    kThreads,
    kDy,
    kX,
    kU,
    kH,
    kKind,
    kWeight,
    kA,
    kB,
    kScaling,
    kP,
    kSeed,
    kScales,
    kNeeds,
    kK,
    kR,
    kAdapterDType,
    kCount
  };
  cpu::LoraLinearBackward g;
  Base base;
  tensors::View dy;
  int64_t needs;
  PlanKey key;

  bool need(int64_t bits) const { return (needs & bits) != 0; }
  bool need_dx() const { return need(kNeedX | kNeedBaseIn); }

  bool read(PyObject* const* a, Py_ssize_t count) {
    DType adapter;
    if (count < kCount || !read_threads(a[kThreads], g.threads)) return false;
    if (!tensors::read_rows(a[kDy], g.dy, g.M, g.N, dy)) return false;
    if (!read_int(a[kNeeds], needs) || !read_int(a[kK], g.K) || !read_int(a[kR], g.R) || g.K < 0 || g.R < 0)
      return false;
    if (!tensors::read_dtype(a[kAdapterDType], adapter) || !complete(a)) return false;
    const DType dtype = g.dy.dtype;
    int64_t M, K;
    tensors::View x;
    if (a[kX] != Py_None &&
        (!tensors::read_rows(a[kX], g.x, M, K, x) || M != g.M || K != g.K || g.x.dtype != dtype))
      return false;
    g.A.dtype = g.B.dtype = adapter, g.h.dtype = dtype;
    if (!read_floats(a[kU], g.u, g.M, g.R) || !read_sized(a[kH], g.h, g.M, g.N) ||
        !read_sized(a[kA], g.A, g.R, g.K) || !read_sized(a[kB], g.B, g.N, g.R))
      return false;
    if (need_dx() && (!base.read(a[kKind], a[kWeight], g.N, g.K, dtype) || base.kind == Base::kNone))
      return false;
    g.weight = base.weight, g.quantised = base.coded();
    if (g.h.dtype != dtype || g.A.dtype != adapter || g.B.dtype != adapter || !fits(adapter, dtype))
      return false;
    if (!read_branch(a + kScaling, g, dtype)) return false;
    key = key_of(a[kSettings], PlanKey::kLoraBackward, g, base, dtype, needs);
    return true;
  }
  bool read_way(PyObject* word, cpu::BaseKind& out) const {
    return base.read_way(word, g.M, g.dy.dtype, g.g_b.data != nullptr, out);
  }
  bool takes_pairs() const {
    return in_bf16(g, g.dy.dtype) && !need(kNeedRank | kNeedDeltaIn | kNeedDeltaOut);
  }

 private:
  // Whether everything is there that the needed gradients read.
  bool complete(PyObject* const* a) const {
    const bool dx = need_dx(), du = dx || need(kNeedA | kNeedDeltaIn | kNeedRank);
    const auto there = [a](int i, bool read) { return !read || a[i] != Py_None; };
    return there(kX, need(kNeedA | kNeedDeltaIn | kNeedBaseIn)) && there(kA, dx || need(kNeedDeltaIn)) &&
           there(kB, du || need(kNeedDeltaOut)) && there(kH, need(kNeedBaseOut)) &&
           there(kU, need(kNeedB | kNeedRank | kNeedDeltaOut));
  }
};

PyObject* backward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  BackwardCall call;
  const Plan* plan = call.read(a, count) ? plans.find(call.key) : nullptr;
  if (plan == nullptr) Py_RETURN_NONE;
  cpu::LoraLinearBackward& g = call.g;
  g.kind = plan->kind, g.pairs = plan->pairs;
  const DType adapter = g.A.dtype;
  Results results;
  if (!make_rows(results, call.need_dx(), call.dy, g.K, g.dy.dtype, g.dx) ||
      !make_matrix(results, call.need(kNeedA), g.R, g.K, adapter, g.dA) ||
      !make_matrix(results, call.need(kNeedB), g.N, g.R, adapter, g.dB) ||
      !make_floats(results, call.need(kNeedBias), g.N, g.dbias) ||
      !make_floats(results, call.need(kNeedRank), g.R, g.dd) ||
      !make_floats(results, call.need(kNeedBaseIn), g.K, g.dp_b) ||
      !make_floats(results, call.need(kNeedDeltaIn), g.K, g.dp_d) ||
      !make_floats(results, call.need(kNeedBaseOut), g.N, g.dg_b) ||
      !make_floats(results, call.need(kNeedDeltaOut), g.N, g.dg_d))
    return nothing();
  if (call.need_dx() &&
      !prepare_product(g.kind, g.vendor, a[call.kDy], a[call.kWeight], g.quantised != nullptr, false,
                       scale_of(a[call.kScales], false), results.at(0)))
    return nullptr;
  if (!run([&] { cpu::lora_linear_backward(g); })) return nullptr;
  if (!call.need(kNeedX)) results.drop(0);
  return results.tuple();
}

PyMethodDef methods[] = {
    {"lora_linear_forward", fast(forward), METH_FASTCALL,
     "(settings, threads, x, kind, weight, A, B, bias, scaling, dropout_p, seed, scales, want_u, want_h) -> "
     "y, "
     "or (y, u, h) if one of the two is wanted; None: not known, or not ordinary."},
    {"lora_linear_forward_learn", fast(learn<ForwardCall>), METH_FASTCALL,
     "(what lora_linear_forward takes, kind, branch in bf16) -> whether calls like this one are taken from "
     "now on."},
    {"lora_linear_backward", fast(backward), METH_FASTCALL,
     "(settings, threads, dy, x, u, h, kind, weight, A, B, scaling, dropout_p, seed, scales, needs, K, R, "
     "adapter dtype) -> (dx, dA, dB, dbias, dd, dp_b, dp_d, dg_b, dg_d), one for each bit of needs; None as "
     "above."},
    {"lora_linear_backward_learn", fast(learn<BackwardCall>), METH_FASTCALL,
     "(what lora_linear_backward takes, kind, branch in bf16) -> whether calls like this one are taken from "
     "now on."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_lora_linear(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace peftkern
