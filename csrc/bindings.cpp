// The Python face of the native code; bindings_cuda.cpp has what runs on GPUs. Python has checked shapes and
// dtypes; sizes and null pointers are checked here once more, since a slip would write to foreign memory. The
// GIL is released while a kernel runs.
#include "bindings.h"

#include <pybind11/stl.h>

#include "peftkern/launchers.h"
#include "peftkern/multi.h"

namespace py = pybind11;
using namespace peftkern;
using namespace py::literals;

namespace {

int check_threads(int threads) {
  require(threads >= 1, "threads must be at least 1");
  return threads;
}

void dropout_mask(uint64_t seed, uint32_t threshold, int64_t M, int64_t K, uintptr_t out, int threads) {
  check_block("out", out, M, K);
  cpu::dropout_mask({{seed, threshold, 0, 0}, M, K, pointer<uint8_t>(out), check_threads(threads)});
}

// --- base product ---
void base_product(const std::string& kind, uintptr_t a, int64_t a_row, int64_t a_col, uintptr_t w,
                  int64_t w_out, int64_t w_in, int dtype, uintptr_t scale, uintptr_t out, int64_t ld,
                  int64_t rows, int64_t cols, int64_t inner, int64_t block_rows, int64_t block_cols,
                  uintptr_t scratch, int64_t scratch_floats, int threads) {
  const bool few = kind == "few", pairs = kind == "bf16";
  require(few || pairs || kind == "panels", "unknown kind");
  require(!pairs || (dtype == static_cast<int>(DType::bf16) && scale == 0),
          "kind bf16: wrong dtype, or a scale");
  require(!pairs || cpu::base_gemm_bf16_usable(), "kind bf16: not on this CPU");
  check_block("a", a, rows, inner);
  check_block("w", w, inner, cols);
  check_block("out", out, rows, cols);
  require(ld >= cols, "ld is less than cols");
  require(dtype >= 0 && dtype <= 2, "unknown dtype");
  require(!few || rows <= cpu::kBaseFewRows, "too many rows for base_few");
  require(!few || w_in == 1 || w_out == 1, "base_few needs one unit stride in w");
  require(few || (block_rows > 0 && block_cols > 0), "block sizes must be positive");
  const int64_t needed =
      few ? rows * (inner + 32) : check_threads(threads) * cpu::base_gemm_scratch(block_rows, block_cols);
  require(scratch != 0 && scratch_floats >= needed, "scratch is too small");
  if (rows == 0 || cols == 0) return;
  require(inner > 0, "inner must be positive");
  const cpu::BaseArgs args{pointer<void>(a),
                           a_row,
                           a_col,
                           pointer<void>(w),
                           w_out,
                           w_in,
                           static_cast<DType>(dtype),
                           pointer<float>(scale),
                           pointer<float>(out),
                           ld,
                           rows,
                           cols,
                           inner,
                           block_rows,
                           block_cols,
                           pointer<float>(scratch),
                           check_threads(threads)};
  few ? cpu::base_few(args) : pairs ? cpu::base_gemm_bf16(args) : cpu::base_gemm(args);
}
// --- end of base product ---

// A matrix that is written: rows must not overlap.
void check_matrix(const char* name, uintptr_t address, int64_t rows, int64_t cols, int64_t ld) {
  check_block(name, address, rows, cols);
  require(rows <= 1 || ld >= cols, (std::string(name) + ": ld is less than the number of columns").c_str());
}

void check_padded(const char* name, uintptr_t address, int64_t rows, int64_t cols, int64_t ld) {
  const int64_t padded = (cols + cpu::kPadColumns - 1) / cpu::kPadColumns * cpu::kPadColumns;
  check_block(name, address, rows, cols);
  require(rows == 0 || ld >= padded, (std::string(name) + ": rows must be padded to whole vectors").c_str());
}

void lora_reduce(uintptr_t in, int dtype, int64_t row, int64_t col, int64_t M, int64_t C, int64_t R,
                 uint64_t seed, uint32_t threshold, uintptr_t p, int64_t ldp, uintptr_t out, float alpha_dot,
                 uintptr_t v, float alpha_outer, uintptr_t g, uintptr_t colsum, int threads) {
  check_block("in", in, M, C);
  require(R >= 0, "R: negative size");
  if (p != 0) {
    check_padded("p", p, R, C, ldp);
    check_block("out", out, M, R);
  }
  if (v != 0) check_block("g", g, R, C);
  cpu::LoraReduceArgs args{};
  args.in = {pointer<void>(in), check_dtype(dtype), row, col};
  args.M = M, args.C = C, args.R = R;
  args.dropout = {seed, threshold, 0, 0};
  args.p = pointer<float>(p), args.ldp = ldp, args.out = pointer<float>(out), args.ldo = R;
  args.v = pointer<float>(v), args.ldv = R, args.g = pointer<float>(g), args.ldg = C;
  args.alpha_dot = alpha_dot, args.alpha_outer = alpha_outer;
  args.colsum = pointer<float>(colsum), args.threads = check_threads(threads);
  cpu::lora_reduce(args);
}

void lora_expand(uintptr_t out, int dtype, int64_t ldo, uintptr_t src, int src_dtype, int64_t lds, int64_t M,
                 int64_t C, int64_t R, uintptr_t v, uintptr_t p, int64_t ldp, float alpha, uint64_t seed,
                 uint32_t threshold, int64_t row0, int64_t col0, uintptr_t base_scale, uintptr_t bias,
                 int threads) {
  check_matrix("out", out, M, C, ldo);
  if (src != 0) check_matrix("src", src, M, C, lds);
  require(src == 0 || src_dtype == 0 || src_dtype == dtype, "src: dtype must be fp32 or that of out");
  check_block("v", v, M, R);
  check_padded("p", p, R, C, ldp);
  require(row0 >= 0 && col0 >= 0, "row0, col0: negative");
  cpu::LoraExpandArgs args{};
  args.out = {pointer<void>(out), check_dtype(dtype), ldo, 1};
  args.src = {pointer<void>(src), check_dtype(src_dtype), lds, 1};
  args.M = M, args.C = C, args.R = R;
  args.v = pointer<float>(v), args.ldv = R, args.p = pointer<float>(p), args.ldp = ldp, args.alpha = alpha;
  args.dropout = {seed, threshold, row0, col0};
  args.base_scale = pointer<float>(base_scale), args.bias = pointer<float>(bias);
  args.threads = check_threads(threads);
  cpu::lora_expand(args);
}

void column_dot(uintptr_t a, int a_dtype, int64_t a_row, int64_t a_col, uintptr_t b, int b_dtype,
                int64_t b_row, int64_t b_col, int64_t M, int64_t C, uintptr_t out, bool accumulate,
                int threads) {
  check_block("a", a, M, C);
  check_block("b", b, M, C);
  check_block("out", out, 1, C);
  cpu::ColumnDotArgs args{};
  args.a = {pointer<void>(a), check_dtype(a_dtype), a_row, a_col};
  args.b = {pointer<void>(b), check_dtype(b_dtype), b_row, b_col};
  args.M = M, args.C = C, args.out = pointer<float>(out), args.accumulate = accumulate;
  args.threads = check_threads(threads);
  cpu::column_dot(args);
}

void scale_copy(uintptr_t in, int in_dtype, int64_t in_row, int64_t in_col, uintptr_t out, int out_dtype,
                int64_t out_row, int64_t out_col, int64_t rows, int64_t cols, int64_t pad, float alpha,
                uintptr_t row_scale, uintptr_t col_scale, int threads) {
  check_block("in", in, rows, cols);
  check_block("out", out, rows, cols);
  require(pad >= 0, "pad: negative");
  cpu::ScaleCopyArgs args{};
  args.in = {pointer<void>(in), check_dtype(in_dtype), in_row, in_col};
  args.out = {pointer<void>(out), check_dtype(out_dtype), out_row, out_col};
  args.rows = rows, args.cols = cols, args.pad = pad, args.alpha = alpha;
  args.row_scale = pointer<float>(row_scale), args.col_scale = pointer<float>(col_scale);
  args.threads = check_threads(threads);
  cpu::scale_copy(args);
}

// --- many adapters ---
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
// --- end of many adapters ---

}  // namespace

PYBIND11_MODULE(_C, m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.doc() = "Native kernels of peftkern. Pointers are integers; Python owns all checks.";
  m.def("isa", &cpu::isa, "Instruction set level in use: plain, avx2 or avx512.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (!cpu::set_isa(name.c_str()))
          throw std::invalid_argument("this CPU or build has no level " + name);
      },
      "name"_a, "Choose an instruction set level by name, or auto.");
  m.def("dropout_mask", &dropout_mask, nogil, "seed"_a, "threshold"_a, "M"_a, "K"_a, "out"_a, "threads"_a);
  // --- base product ---
  m.attr("base_block") = cpu::kBaseBlock;
  m.attr("base_row") = cpu::kBaseRow;
  m.attr("base_tile_cols") = cpu::kBaseTileCols;
  m.attr("base_few_rows") = cpu::kBaseFewRows;
  m.def("features", [] {
    py::set found;
    const unsigned bits = cpu::features();
    if (bits & cpu::kX86) found.add("x86");
    if (bits & cpu::kIntel) found.add("intel");
    if (bits & cpu::kAvx512Bf16) found.add("avx512_bf16");
    if (bits & cpu::kAmxBf16) found.add("amx_bf16");
    if (bits & cpu::kAmxFp16) found.add("amx_fp16");
    return found;
  });
  m.def(
      "cpu_model",
      [] {
        const cpu::CpuModel& found = cpu::cpu_model();
        return py::make_tuple(found.vendor, found.family, found.model);
      },
      "(vendor, family, model) of this CPU; the vendor is empty where it cannot be asked.");
  m.def("base_gemm_bf16_usable", &cpu::base_gemm_bf16_usable,
        "Whether base_product takes kind bf16 here, at the level in use.");
  m.def("base_product", &base_product, nogil, "kind"_a, "a"_a, "a_row"_a, "a_col"_a, "w"_a, "w_out"_a,
        "w_in"_a, "dtype"_a, "scale"_a, "out"_a, "ld"_a, "rows"_a, "cols"_a, "inner"_a, "block_rows"_a,
        "block_cols"_a, "scratch"_a, "scratch_floats"_a, "threads"_a);
  // --- end of base product ---
  m.def("lora_reduce", &lora_reduce, nogil, "in"_a, "dtype"_a, "row"_a, "col"_a, "M"_a, "C"_a, "R"_a,
        "seed"_a, "threshold"_a, "p"_a, "ldp"_a, "out"_a, "alpha_dot"_a, "v"_a, "alpha_outer"_a, "g"_a,
        "colsum"_a, "threads"_a);
  m.def("lora_expand", &lora_expand, nogil, "out"_a, "dtype"_a, "ldo"_a, "src"_a, "src_dtype"_a, "lds"_a,
        "M"_a, "C"_a, "R"_a, "v"_a, "p"_a, "ldp"_a, "alpha"_a, "seed"_a, "threshold"_a, "row0"_a, "col0"_a,
        "base_scale"_a, "bias"_a, "threads"_a);
  m.def("column_dot", &column_dot, nogil, "a"_a, "a_dtype"_a, "a_row"_a, "a_col"_a, "b"_a, "b_dtype"_a,
        "b_row"_a, "b_col"_a, "M"_a, "C"_a, "out"_a, "accumulate"_a, "threads"_a);
  m.def("scale_copy", &scale_copy, nogil, "in"_a, "in_dtype"_a, "in_row"_a, "in_col"_a, "out"_a,
        "out_dtype"_a, "out_row"_a, "out_col"_a, "rows"_a, "cols"_a, "pad"_a, "alpha"_a, "row_scale"_a,
        "col_scale"_a, "threads"_a);
  // --- many adapters ---
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
  // --- end of many adapters ---
#ifdef PEFTKERN_HAVE_CUDA
  m.attr("cuda_built") = true;
  bind_cuda(m);
#else
  m.attr("cuda_built") = false;
#endif
}
