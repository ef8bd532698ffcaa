// The Python face of the native code, a file for each group of entry points; direct/ has those that take any
// ordinary call, without a choice that somebody made, cuda/ has what runs on GPUs.
// Python has checked shapes and dtypes; sizes and null pointers are checked here once more, since a slip
// would write to foreign memory. The GIL is released while a kernel runs.
#include "bindings/checks.h"
#include "bindings/plans.h"
#include "bindings/tensors.h"
#include "peftkern/cpu.h"

namespace py = pybind11;
using namespace peftkern;
using namespace py::literals;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of peftkern. Pointers are integers; Python owns all checks.";
  m.def("isa", &cpu::isa, "Instruction set level in use: plain, avx2 or avx512.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (!cpu::set_isa(name.c_str()))
          throw std::invalid_argument("this CPU or build has no level " + name);
      },
      "name"_a, "Choose an instruction set level by name, or auto.");
  if (!tensors::bind(m.ptr())) throw py::error_already_set();
  bind_adapter_list(m);
  bind_base(m);
  bind_block_rotate(m);
  bind_bottleneck_adapter(m);
  bind_lora(m);
  bind_lora_linear(m);
  bind_lora_row_norm(m);
  bind_multi_lora_linear(m);
  m.def("forget_plans", [] { plans.clear(); }, "Forget what ..._learn was told.");
  bind_unchanged(m);
#ifdef PEFTKERN_HAVE_CUDA
  m.attr("cuda_built") = true;
  bind_cuda(m);
#else
  m.attr("cuda_built") = false;
#endif
}
