// Passes over activations on the CPU: the branch of one adapter, dropout bits, copies.
#include "bindings/checks.h"
#include "peftkern/cpu.h"

namespace py = pybind11;
using namespace peftkern;
using namespace py::literals;

namespace {

void check_padded(const char* name, uintptr_t address, int64_t rows, int64_t cols, int64_t ld) {
  const int64_t padded = (cols + cpu::kPadColumns - 1) / cpu::kPadColumns * cpu::kPadColumns;
  check_block(name, address, rows, cols);
  require(rows == 0 || ld >= padded, (std::string(name) + ": rows must be padded to whole vectors").c_str());
}

void dropout_mask(uint64_t seed, uint32_t threshold, int64_t M, int64_t K, uintptr_t out, int threads) {
  check_block("out", out, M, K);
  cpu::dropout_mask({{seed, threshold, 0, 0}, M, K, pointer<uint8_t>(out), check_threads(threads)});
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

}  // namespace

void peftkern::bind_lora(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("dropout_mask", &dropout_mask, nogil, "seed"_a, "threshold"_a, "M"_a, "K"_a, "out"_a, "threads"_a);
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
}
