// The bindings of the GPU's kernels over the simulator.
#include "bindings/checks.h"
#include "bindings/tensors.h"

PYBIND11_MODULE(peftkern_sim, m) {
  if (!peftkern::tensors::bind(m.ptr())) throw pybind11::error_already_set();
  peftkern::bind_cuda(m);
}
