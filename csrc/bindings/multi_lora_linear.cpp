// multi_lora_linear's passes as one call each, as in lora_linear.cpp.
#include "bindings/adapters.h"
#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "bindings/plans.h"
#include "bindings/results.h"
#include "bindings/tensors.h"
#include "cpu/multi/huge_pages.h"
#include "cpu/multi/linear.h"

#include <memory>

namespace py = pybind11;
using namespace py::literals;

namespace peftkern {
namespace {

PyObject* adapters(PyObject*, PyObject* args) {
  PyObject *weights, *table, *scaling, *vectors;
  long long max_rank, K, N;
  int fixed;
  if (!PyArg_ParseTuple(args, "OOOLLLpO", &weights, &table, &scaling, &max_rank, &K, &N, &fixed, &vectors))
    return nullptr;
  auto made = std::make_unique<Adapters>();
  made->fixed = fixed != 0;
  made->weights = PySequence_Tuple(weights), made->vectors = PySequence_Tuple(vectors);
  if (made->weights == nullptr || made->vectors == nullptr) return nullptr;
  made->table = Py_NewRef(table), made->scaling = Py_NewRef(scaling);
  cpu::MultiAdapters& known = made->known;
  known.max_rank = max_rank, known.K = K, known.N = N;
  tensors::View view;
  if (max_rank < 0 || K < 0 || N < 0 || !tensors::read(table, view) || view.dims != 2 ||
      view.shape[1] != cpu::kMultiColumns)
    Py_RETURN_NONE;
  known.slots = view.shape[0];
  if (!read_array(table, known.table, known.slots * cpu::kMultiColumns) ||
      !read_array(scaling, known.scaling, known.slots, tensors::kFloat) ||
      (made->fixed && !read_tensors(*made, known)))
    Py_RETURN_NONE;
  PyObject* capsule = PyCapsule_New(made.get(), kAdapters, destroy);
  if (capsule != nullptr) made.release();
  return capsule;
}

// --- reading arguments; false: not ours ---

// Which row takes which adapter, and how.
struct Rows {
  const cpu::MultiAdapters* adapters = nullptr;
  const int32_t *order = nullptr, *starts = nullptr;
  const double* dropout_p = nullptr;
  uint64_t seed = 0;

  cpu::MultiBatch batch(int64_t M) const { return {*adapters, order, starts, M, dropout_p, seed}; }

  // The parts in their order: adapters, order, starts, dropout_p, seed; the last two only if `drops`.
  bool read(PyObject* const* a, int64_t M, DType activation, bool drops) {
    if (!PyCapsule_IsValid(a[0], kAdapters)) return false;
    const auto* given = static_cast<const Adapters*>(PyCapsule_GetPointer(a[0], kAdapters));
    adapters = &given->known;
    if (!given->fixed) {
      // Memory and dtype may have changed behind a parameter's back.
      now_ = given->known;
      if (!read_tensors(*given, now_)) return false;
      adapters = &now_;
    }
    if (!fits(adapters->dtype, activation) || !read_array(a[1], order, M) ||
        !read_array(a[2], starts, adapters->slots + 3))
      return false;
    if (!drops || a[3] == Py_None) return true;
    return read_array(a[3], dropout_p, adapters->slots, tensors::kFloat) && read_seed(a[4], seed);
  }

 private:
  cpu::MultiAdapters now_;
};

// What a pass takes, apart from its results.
struct Call {
  int threads = 1;
  int64_t M = 0;
  tensors::View view;  // of the activation
  ConstMatrix in;
  Rows rows;
  Base base;
  PlanKey key;

  Call() = default;
  Call(const Call&) = delete;

  bool read_activation(PyObject* threads_object, PyObject* object, int64_t& columns) {
    return read_threads(threads_object, threads) && tensors::read_rows(object, in, M, columns, view);
  }
  bool read_base(PyObject* kind, PyObject* weight) {
    return base.read(kind, weight, rows.adapters->N, rows.adapters->K, in.dtype);
  }
  void make_key(PyObject* settings, PlanKey::Pass pass, bool other) {
    const cpu::MultiAdapters& a = *rows.adapters;
    key.settings = settings;
    key.facts = {pass,
                 threads,
                 static_cast<int64_t>(in.dtype),
                 static_cast<int64_t>(a.dtype),
                 2 * base.which() + other,
                 base.strides(),
                 M,
                 a.N,
                 a.K,
                 a.max_rank};
  }
  bool read_way(PyObject* word, cpu::BaseKind& out) const {
    return base.read_way(word, M, in.dtype, false, out);
  }
  // The plan of a call that was looked at; false: there is none.
  bool find(cpu::MultiLinear& g) const {
    const Plan* plan = plans.find(key);
    if (plan == nullptr) return false;
    g.base = base.kind != Base::kNone, g.kind = g.base ? plan->kind : cpu::BaseKind::given;
    g.weight = base.weight, g.quantised = base.coded(), g.threads = threads;
    return true;
  }
};

// --- forward ---

struct ForwardCall : Call {
  enum Args {
    kSettings,
    kThreads,
    kX,
    kKind,
    kWeight,
    kBias,
    kAdapters,
    kOrder,
    kStarts,
    kDropout,
    kSeed,
    kWantU,
    kWantH,
    kCount
  };
  ConstMatrix bias;
  bool want_u = false, want_h = false;

  bool read(PyObject* const* a, Py_ssize_t count) {
    int64_t K;
    if (count < kCount || !read_activation(a[kThreads], a[kX], K) ||
        !rows.read(a + kAdapters, M, in.dtype, true) || K != rows.adapters->K ||
        !read_base(a[kKind], a[kWeight]))
      return false;
    if (!tensors::read_vector(a[kBias], bias, rows.adapters->N) || !fits(bias.dtype, in.dtype)) return false;
    want_u = a[kWantU] == Py_True, want_h = a[kWantH] == Py_True;
    make_key(a[kSettings], PlanKey::kMultiForward, false);
    return true;
  }
};

PyObject* forward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  ForwardCall call;
  cpu::MultiLinearForward g;
  if (!call.read(a, count) || !call.find(g)) Py_RETURN_NONE;
  const cpu::MultiAdapters& adapters = *call.rows.adapters;
  Results results;
  Matrix u;
  if (!make_rows(results, true, call.view, adapters.N, call.in.dtype, g.y) ||
      !make_matrix(results, call.want_u, call.M, adapters.max_rank, DType::f32, u) ||
      !make_matrix(results, call.want_h, call.M, adapters.N, call.in.dtype, g.h))
    return nothing();
  PyObject* product = results.at(call.want_h ? 2 : 0);
  if (!prepare_product(g.kind, g.vendor, a[call.kX], a[call.kWeight], g.quantised != nullptr, true, Py_None,
                       product))
    return nullptr;
  g.x = call.in, g.bias = call.bias, g.u = static_cast<float*>(u.data);
  if (!run([&] { multi_linear_forward(call.rows.batch(call.M), g); })) return nullptr;
  return call.want_u || call.want_h ? results.tuple() : results.take(0);
}

// --- backward ---

// A tuple with a bool per tensor.
bool is_need(PyObject* need, size_t tensors) {
  return PyTuple_CheckExact(need) && PyTuple_GET_SIZE(need) == static_cast<Py_ssize_t>(tensors);
}

struct BackwardCall : Call {
  enum Args {
    kSettings,
    kThreads,
    kDy,
    kX,
    kU,
    kKind,
    kWeight,
    kAdapters,
    kOrder,
    kStarts,
    kDropout,
    kSeed,
    kNeedX,
    kNeedBias,
    kNeed,
    kH,
    kNeedVectors,
    kCount
  };
  ConstMatrix x, h;
  const float* u = nullptr;
  bool need_x = false, need_bias = false, need_dx = false;  // need_dx: for x or for a p_b

  bool read(PyObject* const* a, Py_ssize_t count) {
    int64_t N;
    if (count < kCount || !read_activation(a[kThreads], a[kDy], N) ||
        !rows.read(a + kAdapters, M, in.dtype, true) || N != rows.adapters->N)
      return false;
    need_x = a[kNeedX] == Py_True, need_bias = a[kNeedBias] == Py_True;
    if (!is_need(a[kNeed], rows.adapters->weights.size()) ||
        !is_need(a[kNeedVectors], rows.adapters->vectors.size()))
      return false;
    need_dx = need_x || needs_p_b(a[kNeedVectors]);
    if (need_dx && !read_base(a[kKind], a[kWeight])) return false;
    tensors::View view;
    int64_t x_rows, K;
    if (a[kX] != Py_None && (!tensors::read_rows(a[kX], x, x_rows, K, view) || x_rows != M ||
                             K != rows.adapters->K || x.dtype != in.dtype))
      return false;
    if (!read_floats(a[kU], u, M, rows.adapters->max_rank) || !read_sized(a[kH], h, M, N) ||
        (h.data != nullptr && h.dtype != in.dtype))
      return false;
    make_key(a[kSettings], PlanKey::kMultiBackward, need_dx);
    return true;
  }

 private:
  // Whether an adapter's p_b needs a gradient.
  bool needs_p_b(PyObject* need) const {
    const auto count = static_cast<int64_t>(PyTuple_GET_SIZE(need));
    const int64_t* row = rows.adapters->table + cpu::kVectors + 2 * cpu::kPb;
    for (int64_t slot = 0; count > 0 && slot < rows.adapters->slots; ++slot, row += cpu::kMultiColumns) {
      if (*row >= 0 && *row < count && PyTuple_GET_ITEM(need, *row) == Py_True) return true;
    }
    return false;
  }
};

// Gradients of the tensors that need one, like them, None for the others: a list, or null with a Python
// error.
template <class T>
PyObject* make_gradients(PyObject* like_these, PyObject* need, const std::vector<cpu::MultiMemory>& memory,
                         DType dtype, std::vector<T*>& data) {
  const Py_ssize_t count = PyTuple_GET_SIZE(need);
  PyObject* out = PyList_New(count);
  data.assign(count, nullptr);
  for (Py_ssize_t i = 0; out != nullptr && i < count; ++i) {
    PyObject* each = Py_NewRef(Py_None);
    if (PyTuple_GET_ITEM(need, i) == Py_True) {
      Py_DECREF(each);
      tensors::View like;
      void* made = nullptr;
      const bool same =
          tensors::read(PyTuple_GET_ITEM(like_these, i), like) && like.elements() == memory[i].elements;
      each = same ? tensors::empty(like.shape, like.dims, dtype, &made) : nullptr;
      data[i] = static_cast<T*>(made);
      if (!same) PyErr_SetString(PyExc_RuntimeError, "a tensor of an adapter changed during the call");
    }
    if (each == nullptr) {
      Py_CLEAR(out);
    } else {
      PyList_SET_ITEM(out, i, each);
    }
  }
  return out;
}

PyObject* backward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  BackwardCall call;
  cpu::MultiLinearBackward g;
  if (!call.read(a, count) || !call.find(g)) Py_RETURN_NONE;
  const cpu::MultiAdapters& adapters = *call.rows.adapters;
  Results results;
  if (!make_rows(results, call.need_dx, call.view, adapters.K, call.in.dtype, g.dx) ||
      !make_floats(results, call.need_bias, adapters.N, g.dbias))
    return nothing();
  const auto* given = static_cast<Adapters*>(PyCapsule_GetPointer(a[call.kAdapters], kAdapters));
  results.add(make_gradients(given->weights, a[call.kNeed], adapters.weights, adapters.dtype, g.grads));
  results.add(
      make_gradients(given->vectors, a[call.kNeedVectors], adapters.vectors, DType::f32, g.vector_grads));
  if (PyErr_Occurred() != nullptr) return nullptr;
  if (call.need_dx && !prepare_product(g.kind, g.vendor, a[call.kDy], a[call.kWeight], g.quantised != nullptr,
                                       false, Py_None, results.at(0)))
    return nullptr;
  g.dy = call.in, g.x = call.x, g.u = call.u, g.h = call.h;
  if (!run([&] { multi_linear_backward(call.rows.batch(call.M), g); })) return nullptr;
  if (!call.need_x && call.need_dx) results.drop(0);
  return results.tuple();
}

// --- the branch added to what is there ---

struct AddCall : Call {
  enum Args { kSettings, kThreads, kOut, kX, kAdapters, kOrder, kStarts, kCount };
  cpu::MultiLinearForward g;

  bool read(PyObject* const* a, Py_ssize_t count) {
    int64_t K, N, out_rows;
    ConstMatrix out;
    tensors::View out_view;
    if (count != kCount || !read_activation(a[kThreads], a[kX], K) ||
        !rows.read(a + kAdapters, M, in.dtype, false) || K != rows.adapters->K)
      return false;
    if (!tensors::read_rows(a[kOut], out, out_rows, N, out_view) || out_rows != M || N != rows.adapters->N ||
        out.dtype != in.dtype || (N > 1 && out.col != 1) || (M > 1 && out.row < N))
      return false;
    g.x = in, g.y = {const_cast<void*>(out.data), out.dtype, out.row, 1};
    make_key(a[kSettings], PlanKey::kSgmvAdd, false);
    return true;
  }
};

PyObject* add(PyObject*, PyObject* const* a, Py_ssize_t count) {
  AddCall call;
  if (!call.read(a, count) || !call.find(call.g)) Py_RETURN_NONE;
  call.g.kind = cpu::BaseKind::given, call.g.base = true;
  if (!run([&] { multi_linear_forward(call.rows.batch(call.M), call.g); })) return nullptr;
  Py_RETURN_TRUE;
}

PyObject* add_learn(PyObject*, PyObject* const* a, Py_ssize_t count) {
  AddCall call;
  if (!call.read(a, count)) Py_RETURN_FALSE;
  plans.keep(call.key, cpu::BaseKind::given);
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {
    {"adapters", adapters, METH_VARARGS,
     "(weights, table, scaling, max_rank, in_features, out_features, fixed, vectors) -> the adapters as the "
     "entries below take them, or None: not ordinary. fixed: weights and vectors stay where they are."},
    {"multi_lora_linear_forward", fast(forward), METH_FASTCALL,
     "(settings, threads, x, kind, weight, bias, adapters, order, starts, dropout_p, seed, want_u, want_h) "
     "-> "
     "y, or (y, u, h) if u or h is wanted, None where not; None: not known, or not ordinary."},
    {"multi_lora_linear_forward_learn", fast(learn<ForwardCall>), METH_FASTCALL,
     "(what multi_lora_linear_forward takes, kind) -> whether calls like this one are taken from now on."},
    {"multi_lora_linear_backward", fast(backward), METH_FASTCALL,
     "(settings, threads, dy, x, u, kind, weight, adapters, order, starts, dropout_p, seed, need_x, "
     "need_bias, need, h, need_vectors) -> (dx, dbias, gradients of the weights, of the vectors), None where "
     "not needed; None as above."},
    {"multi_lora_linear_backward_learn", fast(learn<BackwardCall>), METH_FASTCALL,
     "(what multi_lora_linear_backward takes, kind) -> whether calls like this one are taken from now on."},
    {"sgmv_add", fast(add), METH_FASTCALL,
     "(settings, threads, out, x, adapters, order, starts) -> True when the branch was added; None as "
     "above."},
    {"sgmv_add_learn", fast(add_learn), METH_FASTCALL,
     "(what sgmv_add takes) -> whether calls like this one are taken from now on."},
    {nullptr, nullptr, 0, nullptr}};

int64_t multi_route(uintptr_t ids, bool wide, int64_t M, uintptr_t table, int64_t slots, int64_t mask,
                    uintptr_t order, uintptr_t starts) {
  check_block("ids", ids, M, 1);
  check_block("table", table, slots, cpu::kMultiColumns);
  check_block("order", order, M, 1);
  check_block("starts", starts, slots + 3, 1);
  return cpu::multi_route(pointer<void>(ids), wide, M, pointer<int64_t>(table), slots, mask,
                          pointer<int32_t>(order), pointer<int32_t>(starts));
}

}  // namespace

void bind_multi_lora_linear(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  m.attr("multi_columns") = cpu::kMultiColumns;
  m.def(
      "ask_huge_pages",
      [](uintptr_t address, int64_t bytes) {
        check_block("address", address, bytes, 1);
        cpu::ask_huge_pages(pointer<void>(address), static_cast<size_t>(bytes));
      },
      "address"_a, "bytes"_a);
  m.def("multi_route", &multi_route, py::call_guard<py::gil_scoped_release>(), "ids"_a, "wide"_a, "M"_a,
        "table"_a, "slots"_a, "mask"_a, "order"_a, "starts"_a);
}

}  // namespace peftkern
