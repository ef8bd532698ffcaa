#include "bindings/cuda/pass.h"

#include <algorithm>

namespace peftkern {
namespace {

// Enough for the batches of most calls: a stream's counters rarely grow.
constexpr int64_t kFewestCounters = 1024;
constexpr Py_ssize_t kMostKept = 4096;

// A key of a dict: device, stream and words.
PyObject* key_of(int32_t device, void* stream, const std::vector<uint64_t>& words) {
  std::vector<uint64_t> key{static_cast<uint64_t>(device), reinterpret_cast<uint64_t>(stream)};
  key.insert(key.end(), words.begin(), words.end());
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(key.data()),
                                   static_cast<Py_ssize_t>(key.size() * sizeof(uint64_t)));
}

// Gives a reference back.
struct Owned {
  PyObject* object;
  explicit Owned(PyObject* given) : object(given) {}
  Owned(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object); }
};

}  // namespace

bool Here::read(PyObject* tuple, PyObject* like) {
  if (!PyTuple_CheckExact(tuple) || PyTuple_GET_SIZE(tuple) != 6) return false;
  int64_t numbers[3];
  for (int i = 0; i < 3; ++i)
    if (!read_int(PyTuple_GET_ITEM(tuple, i), numbers[i])) return false;
  arch = static_cast<int>(numbers[0]), multiprocessors = static_cast<int>(numbers[1]);
  stream = reinterpret_cast<void*>(numbers[2]);
  capturing_ = PyTuple_GET_ITEM(tuple, 3) == Py_True;
  counters_ = PyTuple_GET_ITEM(tuple, 4), addresses_ = PyTuple_GET_ITEM(tuple, 5);
  return PyDict_Check(counters_) && PyDict_Check(addresses_) && tensors::device_of(like, device);
}

// What is kept under a key, if it has as many words; null without an error if not.
void* Here::find(PyObject* kept, PyObject* key, int64_t words, Results& held) const {
  PyObject* found = capturing_ ? nullptr : PyDict_GetItem(kept, key);
  tensors::View view;
  if (found == nullptr || !tensors::read(found, view, device) || view.elements() < words) return nullptr;
  held.add(Py_NewRef(found));
  return view.data;
}

void* Here::make(int64_t words, Results& held) const {
  void* data = nullptr;
  return held.make(&words, 1, DType::f32, &data) ? data : nullptr;
}

bool Here::keep(PyObject* kept, PyObject* key, PyObject* tensor) const {
  if (capturing_) return true;
  if (PyDict_Size(kept) >= kMostKept) PyDict_Clear(kept);
  return PyDict_SetItem(kept, key, tensor) == 0;
}

bool Here::counters(int64_t words, Results& held, uint32_t*& out) {
  out = nullptr;
  if (words == 0) return true;
  const Owned key(key_of(device.index, stream, {}));
  if (key.object == nullptr) return false;
  void* data = find(counters_, key.object, words, held);
  if (data == nullptr) {
    int64_t room = words;
    if (!capturing_)
      for (room = kFewestCounters; room < words;) room *= 2;
    const int at = held.count();
    data = make(room, held);
    if (data == nullptr || !fill_with_zeros(held.at(at)) || !keep(counters_, key.object, held.at(at)))
      return false;
    wrote_ = true;
  }
  out = static_cast<uint32_t*>(data);
  return true;
}

bool Here::addresses(const std::vector<uint64_t>& places, Results& held, const uint64_t*& out) {
  const Owned key(key_of(device.index, stream, places));
  if (key.object == nullptr) return false;
  const auto count = static_cast<int64_t>(places.size());
  void* data = find(addresses_, key.object, 2 * count, held);
  if (data == nullptr) {
    const int at = held.count();
    data = make(2 * std::max<int64_t>(1, count), held);
    if (data == nullptr) return false;
    const char* error = cuda::store_addresses(places.data(), count, static_cast<uint64_t*>(data), stream);
    if (error != nullptr) {
      PyErr_Format(PyExc_RuntimeError, "store_addresses: %s", error);
      return false;
    }
    if (!keep(addresses_, key.object, held.at(at))) return false;
    wrote_ = true;
  }
  out = static_cast<const uint64_t*>(data);
  return true;
}

}  // namespace peftkern
