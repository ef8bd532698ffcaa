// The branch of many adapters on a GPU, added to what is there by one call: tensors in, kernels started.
#include "bindings/cuda/pass.h"
#include "peftkern/cpu_multi.h"

namespace peftkern {
namespace {

// What both entries begin with: `x` and the adapters of its rows.
enum Args {
  kHere,
  kX,
  kWeights,
  kTable,
  kScaling,
  kMaxRank,
  kOrder,
  kStarts,
  kVectors,
  kCount,
};
// What the branch is added to, in this order before and after those of x.
enum AddArgs { kOut = 1, kAddX, kBias = kAddX + kCount - kX, kSrc, kWantU, kDependent, kAddCount };

// dtype and places of tensors whose elements the table counts.
bool read_places(PyObject* tuple, const Here& here, DType& dtype, std::vector<uint64_t>& places,
                 int64_t& count) {
  if (!PyTuple_CheckExact(tuple)) return false;
  count = PyTuple_GET_SIZE(tuple);
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

// `a` begins with x. Where the tensors are: those of weights, then those of vectors.
bool read_rows(PyObject* const* a, const Here& here, cuda::SgmvArgs& g, std::vector<uint64_t>& places) {
  ConstMatrix x;
  tensors::View table;
  if (!read_adjacent(a[0], x, g.M, g.K, here.device)) return false;
  a -= kX;
  g.dtype = g.adapter_dtype = x.dtype, g.arch = here.arch, g.stream = here.stream;
  g.x = x.data, g.x_row = x.row;
  if (!tensors::read(a[kTable], table, here.device) || table.dims != 2 ||
      table.shape[1] != cpu::kMultiColumns)
    return false;
  g.slots = table.shape[0];
  DType of_vectors = DType::f32;
  return read_places(a[kWeights], here, g.adapter_dtype, places, g.tensor_count) &&
         fits(g.adapter_dtype, g.dtype) &&
         read_places(a[kVectors], here, of_vectors, places, g.vector_count) && of_vectors == DType::f32 &&
         read_array(a[kTable], g.table, g.slots * cpu::kMultiColumns, tensors::kInt, here.device) &&
         read_array(a[kScaling], g.scaling, g.slots, tensors::kFloat, here.device) &&
         read_int(a[kMaxRank], g.max_rank) && g.max_rank >= 0 &&
         read_array(a[kOrder], g.order, g.M, tensors::kInt, here.device) &&
         read_array(a[kStarts], g.starts, g.slots + 3, tensors::kInt, here.device);
}

// False with a Python error.
bool place(const std::vector<uint64_t>& places, Here& here, Results& held, cuda::SgmvArgs& g) {
  if (!here.addresses(places, held, g.tensors)) return false;
  g.vectors = g.vector_count > 0 ? g.tensors + g.tensor_count : nullptr;
  return true;
}

// A matrix like out, or nothing.
bool read_like_out(PyObject* object, const Here& here, const cuda::SgmvArgs& g, ConstMatrix& out) {
  int64_t rows = g.M, cols = g.N;
  return object == Py_None || (read_adjacent(object, out, rows, cols, here.device) && rows == g.M &&
                               cols == g.N && out.dtype == g.dtype);
}

bool read(PyObject* const* a, Py_ssize_t count, Here& here, cuda::SgmvArgs& g,
          std::vector<uint64_t>& places) {
  ConstMatrix out, src, bias;
  int64_t rows;
  if (count != kAddCount || !here.read(a[kHere], a[kAddX]) || !read_rows(a + kAddX, here, g, places) ||
      !read_adjacent(a[kOut], out, rows, g.N, here.device) || rows != g.M || out.dtype != g.dtype)
    return false;
  if (g.M > 1 && g.N > 0 && out.row < g.N) return false;  // rows that are written must not overlap
  g.out = const_cast<void*>(out.data), g.out_row = out.row;
  if (!read_like_out(a[kSrc], here, g, src) || !read_gapless(a[kBias], bias, g.N, here.device) ||
      !fits(bias.dtype, g.dtype))
    return false;
  g.src = src.data, g.src_row = src.row, g.bias = bias.data, g.bias_dtype = bias.dtype;
  return true;
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
      !place(places, here, held, g))
    return nullptr;
  // A dependent launch reads early what the one before does not write: not what was written just now.
  g.dependent = a[kDependent] == Py_True && !here.wrote();
  if (!run([&] { check("sgmv_add", cuda::sgmv_add(g)); })) return nullptr;
  return a[kWantU] == Py_True ? results.take(0) : Py_NewRef(Py_True);
}

PyObject* scale(PyObject*, PyObject* const* a, Py_ssize_t count) {
  Here here;
  cuda::SgmvArgs g{};
  std::vector<uint64_t> places;
  if (count != kCount || !here.read(a[kHere], a[kX]) || !read_rows(a + kX, here, g, places)) Py_RETURN_NONE;
  Results results(here.device), held(here.device);
  Matrix out;
  if (!make_matrix(results, true, g.M, g.K, g.dtype, out) || !place(places, here, held, g)) return nullptr;
  g.out = out.data, g.out_row = out.row;
  if (!run([&] { check("scale_rows", cuda::scale_rows(g)); })) return nullptr;
  return results.take(0);
}

PyMethodDef methods[] = {
    {"cuda_sgmv_add", fast(add), METH_FASTCALL,
     "(here, out, x, weights, table, scaling, max_rank, order, starts, vectors, bias, src, want_u, "
     "dependent) -> u if wanted, else True, when the branch was added to out. bias, src: what else the rows "
     "of out are made of, or None. dependent: the launch before makes out or src, and nothing else of this."},
    {"cuda_scale_rows", fast(scale), METH_FASTCALL,
     "(here, x, weights, table, scaling, max_rank, order, starts, vectors) -> x, each row times its "
     "adapter's p_b"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool bind_cuda_multi_lora_linear(PyObject* module) {
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace peftkern
