// The base product on the CPU, and what decides who computes it.
#include "bindings/checks.h"

#include <pybind11/stl.h>

#include <vector>

#include "cpu/base/product.h"
#include "peftkern/cpu.h"

namespace py = pybind11;
using namespace peftkern;
using namespace py::literals;

namespace {

// A kind of product of ours, and who computes it: of codes, nobody alone. "amx, stated":
// base_gemm_amx_stated.
struct Kind {
  const char* word;
  cpu::BaseKind kind;
  void (*compute)(const cpu::BaseArgs&);
  bool pairs = false;
};
const Kind& kind_of(const std::string& word) {
  static const Kind kinds[] = {
      {"panels", cpu::BaseKind::panels, cpu::base_gemm},
      {"few", cpu::BaseKind::few, cpu::base_few},
      {"bf16", cpu::BaseKind::bf16, cpu::base_gemm_bf16, true},
      {"amx", cpu::BaseKind::amx, cpu::base_gemm_amx, true},
      {"int8", cpu::BaseKind::int8, nullptr},
      {"amx, stated", cpu::BaseKind::amx, cpu::base_gemm_amx_stated, true},
  };
  for (const Kind& kind : kinds)
    if (word == kind.word) return kind;
  throw std::invalid_argument("unknown kind");
}

py::tuple base_blocks(const std::string& word, int64_t M, int64_t D, int64_t C, int threads) {
  require(M >= 1 && D >= 1 && C >= 1, "sizes must be positive");
  const cpu::BaseBlocks b = cpu::base_blocks(kind_of(word).kind, M, D, C, check_threads(threads));
  return py::make_tuple(b.rows, b.cols, b.scratch, b.panel);
}

void base_product(const std::string& word, uintptr_t a, int64_t a_row, int64_t a_col, uintptr_t w,
                  int64_t w_out, int64_t w_in, int dtype, uintptr_t scale, uintptr_t out, int64_t ld,
                  int64_t rows, int64_t cols, int64_t inner, uintptr_t scratch, int64_t scratch_floats,
                  int threads) {
  const Kind& kind = kind_of(word);
  const bool few = kind.kind == cpu::BaseKind::few;
  require(kind.compute != nullptr, "a product of codes has rows that were rounded");
  require(!kind.pairs || (dtype == static_cast<int>(DType::bf16) && scale == 0),
          "products of bf16 alone, without a scale");
  require(kind.compute != cpu::base_gemm_bf16 || cpu::base_gemm_bf16_usable(), "kind bf16: not on this CPU");
  require(kind.compute != cpu::base_gemm_amx || cpu::base_gemm_amx_usable(), "kind amx: not on this CPU");
  check_block("a", a, rows, inner);
  check_block("w", w, inner, cols);
  check_block("out", out, rows, cols);
  require(ld >= cols, "ld is less than cols");
  require(dtype >= 0 && dtype <= 2, "unknown dtype");
  require(!few || rows <= cpu::kBaseFewRows, "too many rows for base_few");
  require(!few || w_in == 1 || w_out == 1, "base_few needs one unit stride in w");
  const int64_t needed = few ? rows * (inner + 32) : cpu::base_gemm_scratch(rows, check_threads(threads));
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
                           pointer<float>(scratch),
                           check_threads(threads)};
  kind.compute(args);
}

double fma_peak(bool pairs, int64_t steps, int threads) {
  require(!pairs || cpu::base_gemm_bf16_usable(), "no products of bf16 on this CPU");
  double flops = 0.0;
  std::vector<float> sums(check_threads(threads) * cpu::kPeakRoom);
  const cpu::PeakArgs args{steps, 1.0f, sums.data(), &flops, threads};
  pairs ? cpu::fma_peak_bf16(args) : cpu::fma_peak(args);
  return flops;
}

}  // namespace

void peftkern::bind_base(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
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
  m.def("base_gemm_amx_usable", &cpu::base_gemm_amx_usable, "Likewise kind amx.");
  m.def("fma_peak", &fma_peak, nogil, "pairs"_a, "steps"_a, "threads"_a,
        "FLOPs done by multiply-adds of registers, of pairs of bf16 or in fp32: what to time as the CPU's "
        "peak.");
  m.def("base_blocks", &base_blocks, "kind"_a, "M"_a, "D"_a, "C"_a, "threads"_a,
        "(rows, cols, scratch, panel): see csrc/cpu/base/product.h.");
  m.def("base_product", &base_product, nogil, "kind"_a, "a"_a, "a_row"_a, "a_col"_a, "w"_a, "w_out"_a,
        "w_in"_a, "dtype"_a, "scale"_a, "out"_a, "ld"_a, "rows"_a, "cols"_a, "inner"_a, "scratch"_a,
        "scratch_floats"_a, "threads"_a);
}
