// The Python face of the native code, and the only file that knows pybind11. Pointers come as integers (0 =
// absent). Python has checked shapes and dtypes; sizes and null pointers are checked here once more, since a
// slip would write to foreign memory. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "peftkern/launchers.h"

namespace py = pybind11;
using namespace peftkern;

namespace {

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Sizes must not be negative, and an address may be 0 only if nothing is read or written there.
void check_block(const char* name, uintptr_t address, int64_t rows, int64_t cols) {
  require(rows >= 0 && cols >= 0, (std::string(name) + ": negative size").c_str());
  require(address != 0 || rows == 0 || cols == 0, (std::string(name) + ": null pointer").c_str());
}

int check_threads(int threads) {
  require(threads >= 1, "threads must be at least 1");
  return threads;
}

void dropout_mask(uint64_t seed, uint32_t threshold, int64_t M, int64_t K, uintptr_t out, int threads) {
  check_block("out", out, M, K);
  cpu::dropout_mask({{seed, threshold, 0, 0}, M, K, pointer<uint8_t>(out), check_threads(threads)});
}

#ifdef PEFTKERN_HAVE_CUDA
void cuda_dropout_mask(uintptr_t seed, int64_t M, int64_t K, uint32_t threshold, uintptr_t out,
                       uintptr_t stream) {
  require(seed != 0, "seed: null pointer");
  check_block("out", out, M, K);
  const char* error = cuda::dropout_mask(pointer<int64_t>(seed), M, K, threshold, pointer<uint8_t>(out),
                                         pointer<void>(stream));
  if (error != nullptr) throw std::runtime_error(std::string("dropout_mask: ") + error);
}
#endif

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
      py::arg("name"), "Choose an instruction set level by name, or auto.");
  m.def("dropout_mask", &dropout_mask, nogil, py::arg("seed"), py::arg("threshold"), py::arg("M"),
        py::arg("K"), py::arg("out"), py::arg("threads"));
#ifdef PEFTKERN_HAVE_CUDA
  m.attr("cuda_built") = true;
  m.def("cuda_dropout_mask", &cuda_dropout_mask, nogil, py::arg("seed"), py::arg("M"), py::arg("K"),
        py::arg("threshold"), py::arg("out"), py::arg("stream"));
#else
  m.attr("cuda_built") = false;
#endif
}
