// Many adapters on the CPU.
#include "bindings/checks.h"

#include <pybind11/stl.h>

#include "peftkern/cpu_multi.h"

namespace py = pybind11;
using namespace peftkern;
using namespace py::literals;

namespace {

int64_t multi_route(uintptr_t ids, bool wide, int64_t M, uintptr_t table, int64_t slots, int64_t mask,
                    uintptr_t order, uintptr_t starts) {
  check_block("ids", ids, M, 1);
  check_block("table", table, slots, cpu::kMultiColumns);
  check_block("order", order, M, 1);
  check_block("starts", starts, slots + 3, 1);
  return cpu::multi_route(pointer<void>(ids), wide, M, pointer<int64_t>(table), slots, mask,
                          pointer<int32_t>(order), pointer<int32_t>(starts));
}

cpu::MultiBatch multi_batch(std::vector<uintptr_t> weights, int dtype, uintptr_t table, int64_t slots,
                            uintptr_t order, uintptr_t starts, int64_t M, int64_t max_rank, uintptr_t scaling,
                            uintptr_t dropout_p, uint64_t seed) {
  check_block("table", table, slots, cpu::kMultiColumns);
  check_block("order", order, M, 1);
  check_block("starts", starts, slots + 3, 1);
  require(max_rank >= 0, "max_rank: negative");
  return {std::move(weights),
          check_dtype(dtype),
          pointer<int64_t>(table),
          slots,
          pointer<int32_t>(order),
          pointer<int32_t>(starts),
          M,
          max_rank,
          pointer<float>(scaling),
          pointer<double>(dropout_p),
          seed};
}

void multi_reduce(const cpu::MultiBatch& batch, bool side_b, uintptr_t in, int dtype, int64_t row,
                  int64_t col, int64_t C, uintptr_t dot, uintptr_t v, const std::vector<uintptr_t>& grads,
                  uintptr_t colsum, int threads) {
  check_block("in", in, batch.M, C);
  require(grads.empty() || grads.size() == batch.weights.size(), "grads: one address per tensor of weights");
  require(colsum == 0 || (dot != 0 || batch.M * batch.max_rank == 0), "colsum goes with dot");
  if (!grads.empty()) check_block("v", v, batch.M, batch.max_rank);
  cpu::MultiReduceArgs args{};
  args.side = side_b ? cpu::Side::B : cpu::Side::A;
  args.in = {pointer<void>(in), check_dtype(dtype), row, col};
  args.C = C, args.dot = pointer<float>(dot), args.v = pointer<float>(v), args.ld = batch.max_rank;
  args.grads = grads.empty() ? nullptr : &grads, args.colsum = pointer<float>(colsum);
  args.threads = check_threads(threads);
  cpu::multi_reduce(batch, args);
}

void multi_expand(const cpu::MultiBatch& batch, bool side_b, uintptr_t out, int dtype, int64_t ldo,
                  uintptr_t src, int src_dtype, int64_t lds, int64_t row0, int64_t rows, int64_t col0,
                  int64_t cols, uintptr_t v, uintptr_t bias, int threads) {
  check_matrix("out", out, rows, cols, ldo);
  if (src != 0) check_matrix("src", src, rows, cols, lds);
  require(src == 0 || src_dtype == 0 || src_dtype == dtype, "src: dtype must be fp32 or that of out");
  require(row0 >= 0 && row0 + rows <= batch.M && col0 >= 0, "the block lies outside of the matrix");
  check_block("v", v, batch.M, batch.max_rank);
  cpu::MultiExpandArgs args{};
  args.side = side_b ? cpu::Side::B : cpu::Side::A;
  args.out = {pointer<void>(out), check_dtype(dtype), ldo, 1};
  args.src = {pointer<void>(src), check_dtype(src_dtype), lds, 1};
  args.row0 = row0, args.rows = rows, args.col0 = col0, args.cols = cols;
  args.v = pointer<float>(v), args.ld = batch.max_rank, args.bias = pointer<float>(bias);
  args.threads = check_threads(threads);
  cpu::multi_expand(batch, args);
}

// out (rows x N) = x's branch, added to what is there if `add`. One call for what a few rows need: between
// two layers of a model even the way from Python is far.
void multi_branch(std::vector<uintptr_t> weights, int adapter_dtype, uintptr_t table, int64_t slots,
                  uintptr_t order, uintptr_t starts, int64_t M, int64_t max_rank, uintptr_t scaling,
                  uintptr_t x, int dtype, int64_t row, int64_t col, int64_t K, uintptr_t u, uintptr_t out,
                  int64_t ldo, int64_t N, bool add, int threads) {
  const cpu::MultiBatch batch =
      multi_batch(std::move(weights), adapter_dtype, table, slots, order, starts, M, max_rank, scaling, 0, 0);
  check_block("u", u, M, max_rank);
  multi_reduce(batch, false, x, dtype, row, col, K, u, 0, {}, 0, threads);
  multi_expand(batch, true, out, dtype, ldo, add ? out : 0, dtype, ldo, 0, M, 0, N, u, 0, threads);
}

}  // namespace

void peftkern::bind_multi(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  py::class_<cpu::MultiBatch>(m, "MultiBatch", "Rows by adapter. Keep the tensors alive that it was made of.")
      .def(py::init(&multi_batch), "weights"_a, "dtype"_a, "table"_a, "slots"_a, "order"_a, "starts"_a, "M"_a,
           "max_rank"_a, "scaling"_a, "dropout_p"_a, "seed"_a);
  m.def("multi_route", &multi_route, nogil, "ids"_a, "wide"_a, "M"_a, "table"_a, "slots"_a, "mask"_a,
        "order"_a, "starts"_a);
  m.def("multi_reduce", &multi_reduce, nogil, "batch"_a, "side_b"_a, "in"_a, "dtype"_a, "row"_a, "col"_a,
        "C"_a, "dot"_a, "v"_a, "grads"_a, "colsum"_a, "threads"_a);
  m.def("multi_expand", &multi_expand, nogil, "batch"_a, "side_b"_a, "out"_a, "dtype"_a, "ldo"_a, "src"_a,
        "src_dtype"_a, "lds"_a, "row0"_a, "rows"_a, "col0"_a, "cols"_a, "v"_a, "bias"_a, "threads"_a);
  m.def("multi_branch", &multi_branch, nogil, "weights"_a, "adapter_dtype"_a, "table"_a, "slots"_a, "order"_a,
        "starts"_a, "M"_a, "max_rank"_a, "scaling"_a, "x"_a, "dtype"_a, "row"_a, "col"_a, "K"_a, "u"_a,
        "out"_a, "ldo"_a, "N"_a, "add"_a, "threads"_a);
}
