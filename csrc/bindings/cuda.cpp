// The Python face of the kernels for GPUs (csrc/include/peftkern/cuda.h says what each computes). A matrix is
// a tuple (address, dtype code, row stride, column stride), dropout a tuple (address of the seed, threshold,
// scale of what is kept), a null pointer 0. Every function but the asking ones takes a stream and only starts
// work.
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "bindings/checks.h"
#include "peftkern/cuda.h"

namespace py = pybind11;
using namespace peftkern;
using namespace py::literals;

namespace {

using MatrixTuple = std::tuple<uintptr_t, int, int64_t, int64_t>;
using DropoutTuple = std::tuple<uintptr_t, uint32_t, float>;

void check(const char* what, const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string(what) + ": " + error);
}

ConstMatrix read(const char* name, const MatrixTuple& m, int64_t rows, int64_t cols) {
  const auto& [address, dtype, row, col] = m;
  check_block(name, address, rows, cols);
  return {pointer<void>(address), check_dtype(dtype), row, col};
}

Matrix written(const char* name, const MatrixTuple& m, int64_t rows, int64_t cols) {
  const auto& [address, dtype, row, col] = m;
  check_block(name, address, rows, cols);
  return {pointer<void>(address), check_dtype(dtype), row, col};
}

// Activations, weights and outputs.
template <class M>
M adjacent(const char* name, M matrix) {
  require(matrix.col == 1, (std::string(name) + ": columns must be adjacent").c_str());
  return matrix;
}

cuda::DeviceDropout dropout(const DropoutTuple& d) {
  return {pointer<int64_t>(std::get<0>(d)), std::get<1>(d), std::get<2>(d)};
}

void dropout_mask(uintptr_t seed, int64_t M, int64_t K, uint32_t threshold, uintptr_t out, uintptr_t stream) {
  require(seed != 0, "seed: null pointer");
  check_block("out", out, M, K);
  check("dropout_mask", cuda::dropout_mask(pointer<int64_t>(seed), M, K, threshold, pointer<uint8_t>(out),
                                           pointer<void>(stream)));
}

void lora_shrink(const MatrixTuple& in, const MatrixTuple& p, uintptr_t scale, uintptr_t d, float alpha,
                 const DropoutTuple& drop, int64_t M, int64_t C, int64_t R, uintptr_t out, uintptr_t partial,
                 uintptr_t stream) {
  cuda::LoraShrinkArgs args{};
  args.in = adjacent("in", read("in", in, M, C)), args.p = read("p", p, R, C);
  args.scale = pointer<float>(scale), args.d = pointer<float>(d);
  args.alpha = alpha, args.dropout = dropout(drop);
  args.M = M, args.C = C, args.R = R;
  check_block("out", out, M, R);
  check_block("partial", partial, cuda::lora_shrink_partials(M, C, R, args.in.dtype), 1);
  args.out = pointer<float>(out), args.partial = pointer<float>(partial);
  args.stream = pointer<void>(stream);
  check("lora_shrink", cuda::lora_shrink(args));
}

// Whether the kernel takes the call; then it was started.
bool lora_linear(bool hopper, const MatrixTuple& x, const MatrixTuple& w, bool w_by_row,
                 const MatrixTuple& out, int64_t M, int64_t N, int64_t K, int64_t R, uintptr_t v,
                 const MatrixTuple& a, const MatrixTuple& b, float scaling, uintptr_t d, uintptr_t g_b,
                 uintptr_t g_d, uintptr_t bias, int bias_dtype, const DropoutTuple& drop, uintptr_t counters,
                 int multiprocessors, uintptr_t stream) {
  cuda::LoraLinearArgs args{};
  args.x = adjacent("x", read("x", x, M, K)), args.w = adjacent("w", read("w", w, N, K));
  args.w_by_row = w_by_row;
  args.out = adjacent("out", written("out", out, M, N));
  require(args.x.dtype == args.w.dtype && args.x.dtype == args.out.dtype, "x, w and out: one dtype");
  args.M = M, args.N = N, args.K = K, args.R = R;
  check_block("v", v, M, R);
  args.v = pointer<float>(v), args.b = read("b", b, N, R);
  const bool shrinks = std::get<0>(a) != 0;
  if (shrinks) {
    args.a = read("a", a, R, K);
    check_block("counters", counters, cuda::lora_linear_counters(M), 1);
  }
  args.scaling = scaling;
  args.scales = {pointer<float>(d), nullptr, nullptr, pointer<float>(g_b), pointer<float>(g_d)};
  args.bias = pointer<void>(bias), args.bias_dtype = check_dtype(bias_dtype);
  args.dropout = dropout(drop), args.counters = pointer<uint32_t>(counters);
  args.multiprocessors = multiprocessors, args.stream = pointer<void>(stream);
  if (!(hopper ? cuda::lora_linear_sm90_takes(args) : cuda::lora_linear_sm80_takes(args))) return false;
  check("lora_linear", hopper ? cuda::lora_linear_sm90(args) : cuda::lora_linear_sm80(args));
  return true;
}

cuda::LoraGradArgs grad_args(const MatrixTuple& in, const DropoutTuple& drop, int64_t M, int64_t C, int64_t R,
                             uintptr_t v, uintptr_t v_scale, float alpha, uintptr_t column_scale,
                             const MatrixTuple& grad, const MatrixTuple& p, uintptr_t down_scale,
                             float down_alpha, uintptr_t down, uintptr_t colsum) {
  cuda::LoraGradArgs args{};
  args.in = adjacent("in", read("in", in, M, C)), args.dropout = dropout(drop);
  args.M = M, args.C = C, args.R = R;
  args.v = pointer<float>(v), args.v_scale = pointer<float>(v_scale), args.alpha = alpha;
  args.column_scale = pointer<float>(column_scale);
  if (v != 0) args.grad = written("grad", grad, R, C);
  if (std::get<0>(p) != 0) {
    args.p = read("p", p, R, C);
    check_block("down", down, M, R);
  }
  args.down_scale = pointer<float>(down_scale), args.down_alpha = down_alpha;
  args.down = pointer<float>(down), args.colsum = pointer<float>(colsum);
  return args;
}

int64_t lora_grad_partials(const MatrixTuple& in, const DropoutTuple& drop, int64_t M, int64_t C, int64_t R,
                           uintptr_t v, uintptr_t v_scale, float alpha, uintptr_t column_scale,
                           const MatrixTuple& grad, const MatrixTuple& p, uintptr_t down_scale,
                           float down_alpha, uintptr_t down, uintptr_t colsum) {
  return cuda::lora_grad_partials(grad_args(in, drop, M, C, R, v, v_scale, alpha, column_scale, grad, p,
                                            down_scale, down_alpha, down, colsum));
}

void lora_grad(const MatrixTuple& in, const DropoutTuple& drop, int64_t M, int64_t C, int64_t R, uintptr_t v,
               uintptr_t v_scale, float alpha, uintptr_t column_scale, const MatrixTuple& grad,
               const MatrixTuple& p, uintptr_t down_scale, float down_alpha, uintptr_t down, uintptr_t colsum,
               uintptr_t partial, bool dependent, uintptr_t stream) {
  cuda::LoraGradArgs args = grad_args(in, drop, M, C, R, v, v_scale, alpha, column_scale, grad, p, down_scale,
                                      down_alpha, down, colsum);
  check_block("partial", partial, cuda::lora_grad_partials(args), 1);
  args.partial = pointer<float>(partial), args.stream = pointer<void>(stream);
  args.dependent = dependent;
  check("lora_grad", cuda::lora_grad(args));
}

void lora_row_norm(const MatrixTuple& w, const MatrixTuple& a, const MatrixTuple& b, float scaling, int64_t N,
                   int64_t K, int64_t R, uintptr_t out, uintptr_t partial, bool dependent, uintptr_t stream) {
  cuda::LoraRowNormArgs args{};
  args.w = adjacent("w", read("w", w, N, K)), args.a = read("a", a, R, K), args.b = read("b", b, N, R);
  args.scaling = scaling, args.N = N, args.K = K, args.R = R;
  check_block("out", out, N, 1);
  check_block("partial", partial, cuda::lora_row_norm_partials(N, K, R), 1);
  args.out = pointer<float>(out), args.partial = pointer<float>(partial);
  args.dependent = dependent, args.stream = pointer<void>(stream);
  check("lora_row_norm", cuda::lora_row_norm(args));
}

// --- many adapters ---
void store_addresses(const std::vector<uint64_t>& addresses, uintptr_t out, uintptr_t stream) {
  const auto count = static_cast<int64_t>(addresses.size());
  check_block("out", out, count, 1);
  check("store_addresses",
        cuda::store_addresses(addresses.data(), count, pointer<uint64_t>(out), pointer<void>(stream)));
}

void sgmv_add(const MatrixTuple& out, const MatrixTuple& x, int64_t M, int64_t N, int64_t K,
              int adapter_dtype, uintptr_t tensors, uintptr_t table, int64_t slots, int64_t max_rank,
              uintptr_t scaling, uintptr_t order, uintptr_t starts, uintptr_t u, uintptr_t partial,
              uintptr_t counters, bool dependent, int arch, uintptr_t stream) {
  cuda::SgmvArgs args{};
  const Matrix to = adjacent("out", written("out", out, M, N));
  const ConstMatrix from = adjacent("x", read("x", x, M, K));
  require(to.dtype == from.dtype, "x: dtype must be that of out");
  args.dtype = to.dtype, args.adapter_dtype = check_dtype(adapter_dtype);
  args.out = to.data, args.out_row = to.row, args.x = from.data, args.x_row = from.row;
  args.M = M, args.N = N, args.K = K, args.slots = slots, args.max_rank = max_rank;
  check_block("table", table, slots, 1), check_block("scaling", scaling, slots, 1);
  check_block("order", order, M, 1), check_block("starts", starts, 1, 1);
  check_block("partial", partial, cuda::sgmv_partials(M, K, max_rank, args.dtype, arch), 1);
  check_block("counters", counters, cuda::sgmv_counters(M, max_rank, args.dtype, arch), 1);
  args.tensors = pointer<uint64_t>(tensors), args.table = pointer<int64_t>(table);
  args.scaling = pointer<float>(scaling), args.order = pointer<int32_t>(order);
  args.starts = pointer<int32_t>(starts);
  args.u = pointer<float>(u);
  args.partial = pointer<float>(partial), args.counters = pointer<uint32_t>(counters);
  args.dependent = dependent, args.arch = arch, args.stream = pointer<void>(stream);
  check("sgmv_add", cuda::sgmv_add(args));
}
// --- end of many adapters ---

}  // namespace

void peftkern::bind_cuda(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("cuda_dropout_mask", &dropout_mask, nogil, "seed"_a, "M"_a, "K"_a, "threshold"_a, "out"_a,
        "stream"_a);
  m.def(
      "cuda_lora_shrink_partials",
      [](int64_t M, int64_t C, int64_t R, int dtype) {
        return cuda::lora_shrink_partials(M, C, R, check_dtype(dtype));
      },
      "M"_a, "C"_a, "R"_a, "dtype"_a);
  m.def("cuda_lora_shrink", &lora_shrink, nogil, "in"_a, "p"_a, "scale"_a, "d"_a, "alpha"_a, "dropout"_a,
        "M"_a, "C"_a, "R"_a, "out"_a, "partial"_a, "stream"_a);
  m.def("cuda_lora_linear_counters", &cuda::lora_linear_counters, "M"_a);
  m.def("cuda_lora_linear", &lora_linear, nogil, "hopper"_a, "x"_a, "w"_a, "w_by_row"_a, "out"_a, "M"_a,
        "N"_a, "K"_a, "R"_a, "v"_a, "a"_a, "b"_a, "scaling"_a, "d"_a, "g_b"_a, "g_d"_a, "bias"_a,
        "bias_dtype"_a, "dropout"_a, "counters"_a, "multiprocessors"_a, "stream"_a);
  m.def("cuda_lora_grad_partials", &lora_grad_partials, "in"_a, "dropout"_a, "M"_a, "C"_a, "R"_a, "v"_a,
        "v_scale"_a, "alpha"_a, "column_scale"_a, "grad"_a, "p"_a, "down_scale"_a, "down_alpha"_a, "down"_a,
        "colsum"_a);
  m.def("cuda_lora_grad", &lora_grad, nogil, "in"_a, "dropout"_a, "M"_a, "C"_a, "R"_a, "v"_a, "v_scale"_a,
        "alpha"_a, "column_scale"_a, "grad"_a, "p"_a, "down_scale"_a, "down_alpha"_a, "down"_a, "colsum"_a,
        "partial"_a, "dependent"_a, "stream"_a);
  m.def("cuda_lora_row_norm_partials", &cuda::lora_row_norm_partials, "N"_a, "K"_a, "R"_a);
  m.def("cuda_lora_row_norm", &lora_row_norm, nogil, "w"_a, "a"_a, "b"_a, "scaling"_a, "N"_a, "K"_a, "R"_a,
        "out"_a, "partial"_a, "dependent"_a, "stream"_a);
  // --- many adapters ---
  m.def("cuda_store_addresses", &store_addresses, nogil, "addresses"_a, "out"_a, "stream"_a);
  m.def(
      "cuda_sgmv_in_clusters",
      [](int64_t max_rank, int dtype, int arch) {
        return cuda::sgmv_in_clusters(max_rank, check_dtype(dtype), arch);
      },
      "max_rank"_a, "dtype"_a, "arch"_a);
  m.def(
      "cuda_sgmv_takes",
      [](int64_t max_rank, int dtype, int arch) {
        return cuda::sgmv_takes(max_rank, check_dtype(dtype), arch);
      },
      "max_rank"_a, "dtype"_a, "arch"_a);
  m.def(
      "cuda_sgmv_partials",
      [](int64_t M, int64_t K, int64_t max_rank, int dtype, int arch) {
        return cuda::sgmv_partials(M, K, max_rank, check_dtype(dtype), arch);
      },
      "M"_a, "K"_a, "max_rank"_a, "dtype"_a, "arch"_a);
  m.def(
      "cuda_sgmv_counters",
      [](int64_t M, int64_t max_rank, int dtype, int arch) {
        return cuda::sgmv_counters(M, max_rank, check_dtype(dtype), arch);
      },
      "M"_a, "max_rank"_a, "dtype"_a, "arch"_a);
  m.def("cuda_sgmv_add", &sgmv_add, nogil, "out"_a, "x"_a, "M"_a, "N"_a, "K"_a, "adapter_dtype"_a,
        "tensors"_a, "table"_a, "slots"_a, "max_rank"_a, "scaling"_a, "order"_a, "starts"_a, "u"_a,
        "partial"_a, "counters"_a, "dependent"_a, "arch"_a, "stream"_a);
  // --- end of many adapters ---
}
