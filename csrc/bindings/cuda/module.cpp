// The Python face of the kernels for GPUs (csrc/include/peftkern/cuda.h says what each computes): what asks
// and the dropout mask here, an op's calls in its file. Every function that takes a stream only starts work.
#include "bindings/checks.h"
#include "bindings/cuda/pass.h"

namespace py = pybind11;
using namespace peftkern;
using namespace py::literals;

namespace {

void dropout_mask(uintptr_t seed, int64_t M, int64_t K, uint32_t threshold, uintptr_t out, uintptr_t stream) {
  require(seed != 0, "seed: null pointer");
  check_block("out", out, M, K);
  check("dropout_mask", cuda::dropout_mask(pointer<int64_t>(seed), M, K, threshold, pointer<uint8_t>(out),
                                           pointer<void>(stream)));
}

}  // namespace

void peftkern::bind_cuda(py::module_& m) {
  m.def("cuda_dropout_mask", &dropout_mask, py::call_guard<py::gil_scoped_release>(), "seed"_a, "M"_a, "K"_a,
        "threshold"_a, "out"_a, "stream"_a);
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
  if (!bind_cuda_lora_linear(m.ptr()) || !bind_cuda_multi_lora_linear(m.ptr()) ||
      !bind_cuda_lora_row_norm(m.ptr()) || !bind_cuda_bottleneck_adapter(m.ptr()))
    throw py::error_already_set();
}
