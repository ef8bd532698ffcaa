// Whether an object graph still looks as it did: dictionaries, types and attributes are compared with a
// pattern, without a call into Python code. peftkern/methods/unchanged.py says what a pattern is, and has the
// same check in Python.
#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "bindings/checks.h"

namespace py = pybind11;

namespace {

enum class Kind { kSame, kEqual, kEmpty, kAbsent, kLast, kItems, kObject, kKeep, kAt, kCall };

// Pointers are borrowed from the pattern, whose tuples and copies of whose dicts the owner keeps.
struct Node {
  Kind kind;
  PyObject* value = nullptr;      // what is compared with; the type, the other object, the function
  PyObject* arguments = nullptr;  // of a call
  Py_ssize_t slot = 0;
  std::vector<std::pair<PyObject*, Node>> fields, attributes;  // those of a single part have no key
};

// What the patterns of one check have in common.
struct Owner {
  py::list dicts;
  Py_ssize_t slots = 0;
};

Node compile(PyObject* pattern, Owner& owner);

std::vector<std::pair<PyObject*, Node>> compile_fields(PyObject* given, Owner& owner) {
  if (!PyDict_Check(given)) throw py::type_error("a pattern's fields must be a dict");
  py::object fields = py::reinterpret_steal<py::object>(PyDict_Copy(given));
  if (!fields) throw py::error_already_set();
  owner.dicts.append(fields);
  std::vector<std::pair<PyObject*, Node>> found;
  PyObject *key, *part;
  for (Py_ssize_t at = 0; PyDict_Next(fields.ptr(), &at, &key, &part);)
    found.emplace_back(key, compile(part, owner));
  return found;
}

Node compile(PyObject* pattern, Owner& owner) {
  static constexpr std::pair<const char*, int> kSizes[] = {
      {"same", 2},  {"equal", 2},  {"empty", 1}, {"absent", 1}, {"last", 2},
      {"items", 2}, {"object", 4}, {"keep", 3},  {"at", 3},     {"call", 4}};
  const char* name = nullptr;
  if (PyTuple_Check(pattern) && PyTuple_GET_SIZE(pattern) && PyUnicode_Check(PyTuple_GET_ITEM(pattern, 0)))
    name = PyUnicode_AsUTF8(PyTuple_GET_ITEM(pattern, 0));
  if (name == nullptr) throw py::type_error("a pattern is a tuple that begins with its kind");
  for (int kind = 0; kind < 10; ++kind) {
    if (std::strcmp(name, kSizes[kind].first) != 0) continue;
    if (PyTuple_GET_SIZE(pattern) != kSizes[kind].second)
      throw py::type_error(std::string("a pattern of the wrong size: ") + name);
    Node node{static_cast<Kind>(kind)};
    auto part = [&](int i) { return PyTuple_GET_ITEM(pattern, i); };
    auto inner = [&](int i) { node.fields.emplace_back(nullptr, compile(part(i), owner)); };
    if (node.kind != Kind::kEmpty && node.kind != Kind::kAbsent) node.value = part(1);
    if (node.kind == Kind::kItems) node.fields = compile_fields(part(1), owner);
    if (node.kind == Kind::kObject) {
      if (!PyType_Check(node.value)) throw py::type_error("a pattern's type must be a type");
      node.fields = compile_fields(part(2), owner), node.attributes = compile_fields(part(3), owner);
    }
    if (node.kind == Kind::kKeep) {
      node.slot = PyLong_Check(node.value) ? PyLong_AsSsize_t(node.value) : -1;
      if (PyErr_Occurred()) throw py::error_already_set();
      if (node.slot < 0) throw py::type_error("a pattern's slot must be an index");
      owner.slots = std::max(owner.slots, node.slot + 1);
    }
    if (node.kind == Kind::kKeep || node.kind == Kind::kAt) inner(2);
    if (node.kind == Kind::kCall) {
      node.arguments = part(2);
      if (!PyTuple_Check(node.arguments)) throw py::type_error("a pattern's arguments must be a tuple");
      inner(3);
    }
    return node;
  }
  throw py::type_error(std::string("a pattern of unknown kind: ") + name);
}

bool equal(PyObject* now, PyObject* then) {
  if (now == then) return true;
  return Py_TYPE(now) == Py_TYPE(then) && PyObject_RichCompareBool(now, then, Py_EQ) == 1;
}

// One check. A layer's objects are small, many and far apart, and by its next call other layers have taken
// their places in the caches: so the check notes which lines it reads, and the next one asks for all of them
// before it reads the first. An address where nothing lies any more does no harm.
struct Check {
  PyObject* kept;
  std::vector<const char*> lines;

  void ask() {
    for (const char* line : lines) __builtin_prefetch(line);
    lines.clear();
  }
  void reads(const void* at, size_t bytes) {
    const auto* begin = static_cast<const char*>(at);
    const char* line = begin - reinterpret_cast<uintptr_t>(at) % 64;
    for (; line < begin + bytes; line += 64) lines.push_back(line);
  }
  void reads_dict(PyObject* dict) {
    const auto* d = reinterpret_cast<PyDictObject*>(dict);
    reads(d, sizeof(PyDictObject));
    if (d->ma_values != nullptr)
      reads(d->ma_values, d->ma_used * sizeof(PyObject*));
    else if (d->ma_used > 0)
      reads(d->ma_keys, kKeysBytes + d->ma_used * (2 * sizeof(PyObject*) + 2));
  }

 private:
  static constexpr size_t kKeysBytes = 32;  // of the head of a table of keys
};

bool matches(const Node& node, PyObject* now, Check& check);

bool items_match(const std::vector<std::pair<PyObject*, Node>>& fields, PyObject* dict, Check& check) {
  check.reads_dict(dict);
  for (const auto& [key, part] : fields) {
    PyObject* item = PyDict_GetItemWithError(dict, key);
    if (item == nullptr) {
      if (part.kind != Kind::kAbsent || PyErr_Occurred()) return false;
    } else if (item != part.value || (part.kind != Kind::kSame && part.kind != Kind::kEqual)) {
      // Looking deeper may run code that takes the item away.
      py::object held = py::reinterpret_borrow<py::object>(item);
      if (!matches(part, item, check)) return false;
    }
  }
  return true;
}

bool attributes_match(const std::vector<std::pair<PyObject*, Node>>& attributes, PyObject* now,
                      Check& check) {
  for (const auto& [name, part] : attributes) {
    py::object value = py::reinterpret_steal<py::object>(PyObject_GetAttr(now, name));
    if (!value || !matches(part, value.ptr(), check)) return false;
  }
  return true;
}

bool matches(const Node& node, PyObject* now, Check& check) {
  switch (node.kind) {
    case Kind::kSame:
      return now == node.value;
    case Kind::kEqual:
      return equal(now, node.value);
    case Kind::kEmpty:
      check.reads(now, sizeof(PyDictObject));
      return PyDict_Check(now) ? PyDict_GET_SIZE(now) == 0 : PyObject_Size(now) == 0;
    case Kind::kAbsent:
      return false;
    case Kind::kLast: {
      if (!PyTuple_Check(now) || PyTuple_GET_SIZE(now) == 0) return false;
      return equal(PyTuple_GET_ITEM(now, PyTuple_GET_SIZE(now) - 1), node.value);
    }
    case Kind::kItems:
      return PyDict_Check(now) && items_match(node.fields, now, check);
    case Kind::kObject: {
      check.reads(now, sizeof(PyObject));
      if (reinterpret_cast<PyObject*>(Py_TYPE(now)) != node.value) return false;
      if (!node.fields.empty()) {
        py::object own = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(now, nullptr));
        if (!own || !items_match(node.fields, own.ptr(), check)) return false;
      }
      return attributes_match(node.attributes, now, check);
    }
    case Kind::kKeep: {
      if (!matches(node.fields[0].second, now, check)) return false;
      Py_INCREF(now);
      return PyTuple_SetItem(check.kept, node.slot, now) == 0;
    }
    case Kind::kAt:
      return matches(node.fields[0].second, node.value, check);
    case Kind::kCall: {
      py::object answer = py::reinterpret_steal<py::object>(PyObject_CallObject(node.value, node.arguments));
      return answer && matches(node.fields[0].second, answer.ptr(), check);
    }
  }
  return false;
}

struct Unchanged {
  PyObject_HEAD;
  PyObject* owned;  // what the nodes point into: the patterns, and copies of their dicts
  std::vector<Node>* nodes;
  Py_ssize_t slots;
  std::vector<const char*>* lines;  // that the last check read
};

Unchanged* of(PyObject* self) {
  return reinterpret_cast<Unchanged*>(self);
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) {
  try {
    auto nodes = std::make_unique<std::vector<Node>>();
    Owner owner;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i)
      nodes->push_back(compile(PyTuple_GET_ITEM(args, i), owner));
    py::tuple owned = py::make_tuple(py::reinterpret_borrow<py::object>(args), owner.dicts);
    PyObject* self = type->tp_alloc(type, 0);
    if (self == nullptr) return nullptr;
    of(self)->owned = owned.release().ptr(), of(self)->nodes = nodes.release(), of(self)->slots = owner.slots;
    of(self)->lines = new std::vector<const char*>;
    return self;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (py::builtin_exception& error) {
    error.set_error();
  }
  return nullptr;
}

PyObject* match(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  const auto& nodes = *of(self)->nodes;
  const auto size = static_cast<Py_ssize_t>(nodes.size());
  if (count > size) {
    PyErr_Format(PyExc_TypeError, "match takes at most %zd objects, got %zd", size, count);
    return nullptr;
  }
  py::object kept = py::reinterpret_steal<py::object>(PyTuple_New(of(self)->slots));
  if (!kept) return nullptr;
  for (Py_ssize_t i = 0; i < of(self)->slots; ++i) {
    Py_INCREF(Py_None);
    PyTuple_SET_ITEM(kept.ptr(), i, Py_None);
  }
  Check check{kept.ptr(), std::move(*of(self)->lines)};
  check.ask();
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (matches(nodes[i], i < count ? objects[i] : Py_None, check)) continue;
    // What cannot be looked at is not as it was: who looks with care will say why.
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  *of(self)->lines = std::move(check.lines);
  return kept.release().ptr();
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(of(self)->owned);
  return 0;
}

int clear(PyObject* self) {
  if (of(self)->nodes != nullptr) of(self)->nodes->clear();
  Py_CLEAR(of(self)->owned);
  return 0;
}

void destroy(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  clear(self);
  delete of(self)->nodes;
  delete of(self)->lines;
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef kMethods[] = {
    {"match", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(match)), METH_FASTCALL,
     "The objects that the pattern keeps, as a tuple, or None if anything differs."},
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot kSlots[] = {{Py_tp_doc, const_cast<char*>("A pattern for each of some objects.")},
                        {Py_tp_new, reinterpret_cast<void*>(make)},
                        {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
                        {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
                        {Py_tp_clear, reinterpret_cast<void*>(clear)},
                        {Py_tp_methods, kMethods},
                        {0, nullptr}};

PyType_Spec kSpec = {"peftkern._C.Unchanged", sizeof(Unchanged), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                     kSlots};

}  // namespace

namespace peftkern {

void bind_unchanged(py::module_& m) {
  m.attr("Unchanged") = py::reinterpret_steal<py::object>(PyType_FromSpec(&kSpec));
}

}  // namespace peftkern
