// multi_lora_linear's passes as one call each, as in lora_linear.cpp. The adapters come as an object that was
// made of their tensors before, so that a call need not walk all of them.
#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "bindings/plans.h"
#include "bindings/results.h"
#include "bindings/tensors.h"
#include "cpu/multi/linear.h"

#include <memory>

namespace py = pybind11;
using namespace py::literals;

namespace peftkern {
namespace {

// --- the adapters ---

constexpr const char* kAdapters = "peftkern.adapters";

struct Adapters {
  PyObject *weights = nullptr, *table = nullptr, *scaling = nullptr;  // a tuple of tensors, and two
  bool fixed;                                                         // the tensors never move
  cpu::MultiAdapters known;  // `weights` of it are filled if they never move

  ~Adapters() {
    for (PyObject* each : {weights, table, scaling}) Py_XDECREF(each);
  }
};

bool read_weights(PyObject* tuple, cpu::MultiAdapters& out) {
  const Py_ssize_t count = PyTuple_GET_SIZE(tuple);
  out.weights.reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    tensors::View view;
    DType dtype;
    if (!tensors::read(PyTuple_GET_ITEM(tuple, i), view) || !view.dtype(dtype) || !view.contiguous())
      return false;
    if (i == 0) out.dtype = dtype;
    if (dtype != out.dtype) return false;
    out.weights.push_back({view.data, view.elements()});
  }
  return true;
}

void destroy(PyObject* capsule) {
  delete static_cast<Adapters*>(PyCapsule_GetPointer(capsule, kAdapters));
}

PyObject* adapters(PyObject*, PyObject* args) {
  PyObject *weights, *table, *scaling;
  long long max_rank, K, N;
  int fixed;
  if (!PyArg_ParseTuple(args, "OOOLLLp", &weights, &table, &scaling, &max_rank, &K, &N, &fixed))
    return nullptr;
  auto made = std::make_unique<Adapters>();
  made->fixed = fixed != 0;
  made->weights = PySequence_Tuple(weights);
  if (made->weights == nullptr) return nullptr;
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
      (made->fixed && !read_weights(made->weights, known)))
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
      if (!read_weights(given->weights, now_)) return false;
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
                 2 * base.kind + other,
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
    g.weight = base.weight, g.threads = threads;
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
    kCount
  };
  ConstMatrix bias;
  bool want_u = false;

  bool read(PyObject* const* a, Py_ssize_t count) {
    int64_t K;
    if (count < kCount || !read_activation(a[kThreads], a[kX], K) ||
        !rows.read(a + kAdapters, M, in.dtype, true) || K != rows.adapters->K ||
        !read_base(a[kKind], a[kWeight]))
      return false;
    if (!tensors::read_vector(a[kBias], bias, rows.adapters->N) || !fits(bias.dtype, in.dtype)) return false;
    want_u = a[kWantU] == Py_True;
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
      !make_matrix(results, call.want_u, call.M, adapters.max_rank, DType::f32, u))
    return nothing();
  if (!prepare_product(g.kind, g.vendor, a[call.kX], a[call.kWeight], true, Py_None, results.at(0)))
    return nullptr;
  g.x = call.in, g.bias = call.bias, g.u = static_cast<float*>(u.data);
  if (!run([&] { multi_linear_forward(call.rows.batch(call.M), g); })) return nullptr;
  return call.want_u ? results.tuple() : results.take(0);
}

// --- backward ---

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
    kCount
  };
  ConstMatrix x;
  const float* u = nullptr;
  bool need_x = false, need_bias = false;

  bool read(PyObject* const* a, Py_ssize_t count) {
    int64_t N;
    if (count < kCount || !read_activation(a[kThreads], a[kDy], N) ||
        !rows.read(a + kAdapters, M, in.dtype, true) || N != rows.adapters->N)
      return false;
    need_x = a[kNeedX] == Py_True, need_bias = a[kNeedBias] == Py_True;
    if (need_x && !read_base(a[kKind], a[kWeight])) return false;
    tensors::View view;
    int64_t x_rows, K;
    if (a[kX] != Py_None && (!tensors::read_rows(a[kX], x, x_rows, K, view) || x_rows != M ||
                             K != rows.adapters->K || x.dtype != in.dtype))
      return false;
    if (!read_floats(a[kU], u, M, rows.adapters->max_rank) || !PyTuple_CheckExact(a[kNeed]) ||
        PyTuple_GET_SIZE(a[kNeed]) != static_cast<Py_ssize_t>(rows.adapters->weights.size()))
      return false;
    make_key(a[kSettings], PlanKey::kMultiBackward, need_x);
    return true;
  }
};

// Gradients of the weights that need one, like them, None for the others: a list, or null with a Python
// error.
PyObject* make_gradients(PyObject* weights, PyObject* need, const cpu::MultiAdapters& adapters,
                         std::vector<void*>& data) {
  const Py_ssize_t count = PyTuple_GET_SIZE(need);
  PyObject* out = PyList_New(count);
  data.assign(count, nullptr);
  for (Py_ssize_t i = 0; out != nullptr && i < count; ++i) {
    PyObject* each = Py_NewRef(Py_None);
    if (PyTuple_GET_ITEM(need, i) == Py_True) {
      Py_DECREF(each);
      tensors::View like;
      const bool same = tensors::read(PyTuple_GET_ITEM(weights, i), like) &&
                        like.elements() == adapters.weights[i].elements;
      each = same ? tensors::empty(like.shape, like.dims, adapters.dtype, &data[i]) : nullptr;
      if (!same) PyErr_SetString(PyExc_RuntimeError, "a tensor of weights changed during the call");
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
  if (!make_rows(results, call.need_x, call.view, adapters.K, call.in.dtype, g.dx) ||
      !make_floats(results, call.need_bias, adapters.N, g.dbias))
    return nothing();
  PyObject* weights = static_cast<Adapters*>(PyCapsule_GetPointer(a[call.kAdapters], kAdapters))->weights;
  PyObject* grads = make_gradients(weights, a[call.kNeed], adapters, g.grads);
  if (grads == nullptr) return nullptr;
  results.add(grads);
  if (call.need_x &&
      !prepare_product(g.kind, g.vendor, a[call.kDy], a[call.kWeight], false, Py_None, results.at(0)))
    return nullptr;
  g.dy = call.in, g.x = call.x, g.u = call.u;
  if (!run([&] { multi_linear_backward(call.rows.batch(call.M), g); })) return nullptr;
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
     "(weights, table, scaling, max_rank, in_features, out_features, fixed) -> the adapters as the entries "
     "below "
     "take them, or None: not ordinary. fixed: the weights stay where they are."},
    {"multi_lora_linear_forward", fast(forward), METH_FASTCALL,
     "(settings, threads, x, kind, weight, bias, adapters, order, starts, dropout_p, seed, want_u) -> y, or "
     "(y, u) "
     "if u is wanted; None: not known, or not ordinary."},
    {"multi_lora_linear_forward_learn", fast(learn<ForwardCall>), METH_FASTCALL,
     "(what multi_lora_linear_forward takes, kind) -> whether calls like this one are taken from now on."},
    {"multi_lora_linear_backward", fast(backward), METH_FASTCALL,
     "(settings, threads, dy, x, u, kind, weight, adapters, order, starts, dropout_p, seed, need_x, "
     "need_bias, need) "
     "-> (dx, dbias, gradients of the weights), None where not needed; None as above."},
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
  m.def("multi_route", &multi_route, py::call_guard<py::gil_scoped_release>(), "ids"_a, "wide"_a, "M"_a,
        "table"_a, "slots"_a, "mask"_a, "order"_a, "starts"_a);
}

}  // namespace peftkern
