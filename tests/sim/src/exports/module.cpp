// The bindings of the GPU's kernels over the simulator.
#include "bindings/checks.h"

PYBIND11_MODULE(peftkern_sim, m) {
  peftkern::bind_cuda(m);
}
