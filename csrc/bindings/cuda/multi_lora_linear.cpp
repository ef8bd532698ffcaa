// The branch of many adapters on a GPU, added to what is there by one call: tensors in, kernels started.
#include "bindings/cuda/pass.h"
#include "peftkern/cpu_multi.h"

namespace peftkern {
namespace {

enum Args {
  kHere,
  kOut,
  kX,
  kWeights,
  kTable,
  kScaling,
  kMaxRank,
  kOrder,
  kStarts,
  kWantU,
  kDependent,
  kCount
};

// dtype and places of the adapters' tensors, whose elements the table counts.
bool read_weights(PyObject* tuple, const Here& here, DType& dtype, std::vector<uint64_t>& places) {
  if (!PyTuple_CheckExact(tuple)) return false;
  const Py_ssize_t count = PyTuple_GET_SIZE(tuple);
  places.reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    tensors::View view;
    DType each;
    if (!tensors::read(PyTuple_GET_ITEM(tuple, i), view, here.device) || !view.dtype(each)) return false;
    if (i == 0) dtype = each;
    if (each != dtype) return false;
    places.push_back(reinterpret_cast<uint64_t>(view.data));
  }
  return true;
}

bool read(PyObject* const* a, Py_ssize_t count, Here& here, cuda::SgmvArgs& g,
          std::vector<uint64_t>& places) {
  ConstMatrix x, out;
  int64_t rows;
  tensors::View table;
  if (count != kCount || !here.read(a[kHere], a[kX]) || !read_adjacent(a[kX], x, g.M, g.K, here.device) ||
      !read_adjacent(a[kOut], out, rows, g.N, here.device) || rows != g.M || out.dtype != x.dtype)
    return false;
  if (g.M > 1 && g.N > 0 && out.row < g.N) return false;  // rows that are written must not overlap
  g.dtype = g.adapter_dtype = x.dtype, g.arch = here.arch, g.stream = here.stream;
  g.x = x.data, g.x_row = x.row, g.out = const_cast<void*>(out.data), g.out_row = out.row;
  if (!tensors::read(a[kTable], table, here.device) || table.dims != 2 ||
      table.shape[1] != cpu::kMultiColumns)
    return false;
  g.slots = table.shape[0];
  return read_weights(a[kWeights], here, g.adapter_dtype, places) && fits(g.adapter_dtype, g.dtype) &&
         read_array(a[kTable], g.table, g.slots * cpu::kMultiColumns, tensors::kInt, here.device) &&
         read_array(a[kScaling], g.scaling, g.slots, tensors::kFloat, here.device) &&
         read_int(a[kMaxRank], g.max_rank) && g.max_rank >= 0 &&
         read_array(a[kOrder], g.order, g.M, tensors::kInt, here.device) &&
         read_array(a[kStarts], g.starts, g.slots + 3, tensors::kInt, here.device);
}

PyObject* add(PyObject*, PyObject* const* a, Py_ssize_t count) {
  Here here;
  cuda::SgmvArgs g{};
  std::vector<uint64_t> places;
  if (!read(a, count, here, g, places)) Py_RETURN_NONE;
  Results results(here.device), held(here.device);
  Matrix u;
  if (!make_matrix(results, a[kWantU] == Py_True, g.M, g.max_rank, DType::f32, u)) return nullptr;
  g.u = static_cast<float*>(u.data);
  const int64_t partials = cuda::sgmv_partials(g.M, g.K, g.max_rank, g.dtype, g.arch);
  if (!make_floats(held, partials > 0, partials, g.partial) ||
      !here.counters(cuda::sgmv_counters(g.M, g.max_rank, g.dtype, g.arch), held, g.counters) ||
      !here.addresses(places, held, g.tensors))
    return nullptr;
  // A dependent launch reads early what the one before does not write: not what was written just now.
  g.dependent = a[kDependent] == Py_True && !here.wrote();
  if (!run([&] { check("sgmv_add", cuda::sgmv_add(g)); })) return nullptr;
  return a[kWantU] == Py_True ? results.take(0) : Py_NewRef(Py_True);
}

PyMethodDef methods[] = {{"cuda_sgmv_add", fast(add), METH_FASTCALL,
                          "(here, out, x, weights, table, scaling, max_rank, order, starts, want_u, "
                          "dependent) -> u if wanted, else "
                          "True, when the branch was added to out. dependent: the launch before makes out, "
                          "and nothing else of this."},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool bind_cuda_multi_lora_linear(PyObject* module) {
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace peftkern
