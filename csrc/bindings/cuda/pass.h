// What entries for GPUs share that take tensors: where a call runs, the memory that its kernels need beside
// its results, and how it ends. An entry returns None for a call that is not ordinary; Python then copies
// what is no plain tensor.
#pragma once

#include "bindings/arguments.h"
#include "bindings/results.h"
#include "peftkern/cuda.h"

#include <string>
#include <vector>

namespace peftkern {

// The tuple (compute capability, multiprocessors, stream, whether a graph is being captured, kept counters,
// kept addresses) that Python begins a call with; the last two are dicts, see
// peftkern/backends/cuda/native.py.
class Here {
 public:
  int arch = 0, multiprocessors = 0;
  void* stream = nullptr;
  tensors::Device device;

  // `like`: a tensor of the call. False: not ordinary.
  bool read(PyObject* tuple, PyObject* like);

  // At least so many 32-bit zeros, which every kernel that takes them leaves as zeros; `held` holds them.
  // One launch at a time may use them: they are kept per stream, and a graph, which may be replayed on any
  // stream, gets its own, zeroed by the graph. False with a Python error.
  bool counters(int64_t words, Results& held, uint32_t*& out);
  // Where each tensor begins, in the device's memory, kept for the stream that wrote them; a graph's are its
  // own.
  bool addresses(const std::vector<uint64_t>& places, Results& held, const uint64_t*& out);
  // Whether one of the two has started work on the stream.
  bool wrote() const { return wrote_; }

 private:
  void* find(PyObject* kept, PyObject* key, int64_t words, Results& held) const;
  void* make(int64_t words, Results& held) const;
  bool keep(PyObject* kept, PyObject* key, PyObject* tensor) const;

  PyObject *counters_ = nullptr, *addresses_ = nullptr;
  bool capturing_ = false, wrote_ = false;
};

// Throws if a launch failed.
inline void check(const char* what, const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string(what) + ": " + error);
}

// False with a Python error.
inline bool fill_with_zeros(PyObject* tensor) {
  PyObject* done = PyObject_CallMethod(tensor, "zero_", nullptr);
  Py_XDECREF(done);
  return done != nullptr;
}

// A vector without gaps; fp32, or for a bias the activation's dtype too.
inline bool read_gapless(PyObject* object, ConstMatrix& out, int64_t size, tensors::Device where) {
  return tensors::read_vector(object, out, size, where) && (out.data == nullptr || size <= 1 || out.col == 1);
}

// Rows of adjacent columns, as activations and results have them.
inline bool read_adjacent(PyObject* object, ConstMatrix& out, int64_t& rows, int64_t& cols,
                          tensors::Device where) {
  return tensors::read_matrix(object, out, rows, cols, where) && (out.col == 1 || rows * cols == 0);
}

// Each adds the entries of one op. False with a Python error.
bool bind_cuda_lora_linear(PyObject* module);
bool bind_cuda_multi_lora_linear(PyObject* module);
bool bind_cuda_lora_row_norm(PyObject* module);
bool bind_cuda_bottleneck_adapter(PyObject* module);

}  // namespace peftkern
