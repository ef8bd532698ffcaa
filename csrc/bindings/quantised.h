// A quantised weight as an entry is told of it: the kind's name, and its tensors as peftkern/bases has them.
#pragma once

#include <Python.h>

#include "bindings/tensors.h"
#include "peftkern/quantised.h"

namespace peftkern {

// False, without a Python error, for a kind that has no loader, or tensors that do not hold N x K codes and
// what belongs to them, on that device.
bool read_quantised(PyObject* word, PyObject* tensors, int64_t N, int64_t K, Quantised& out,
                    tensors::Device where = {});

}  // namespace peftkern
