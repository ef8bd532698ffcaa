#include "bindings/quantised.h"

#include <algorithm>
#include <cstring>

#include "peftkern/cpu.h"

namespace peftkern {
namespace {

using Code = Quantised::Code;
using Order = Quantised::Order;
using Number = Quantised::Number;
using tensors::View;

// Of DLPack.
constexpr uint8_t kUint = 1, kE4m3 = 10, kE5m2 = 12;
int64_t ceil_div(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

// The tensors of a base, which are few.
struct Tensors {
  static constexpr int kMost = 5;
  View of[kMost];
  Py_ssize_t count = 0;

  bool read(PyObject* object, tensors::Device where) {
    PyObject* one = object;
    PyObject** items = &one;
    count = 1;
    if (PyTuple_CheckExact(object)) {
      count = PyTuple_GET_SIZE(object);
      items = &PyTuple_GET_ITEM(object, 0);
    }
    if (count < 1 || count > kMost) return false;
    for (Py_ssize_t i = 0; i < count; ++i)
      if (!tensors::read(items[i], of[i], where)) return false;
    return true;
  }
  // So many elements of 8 bits, adjacent.
  bool bytes(int i, int64_t elements, uint8_t kind = kUint) const {
    return of[i].kind == kind && of[i].bits == 8 && of[i].contiguous() && of[i].elements() == elements;
  }
  // Numbers in fp32, bf16 or fp16, adjacent.
  bool numbers(int i, Number& number) const {
    DType dtype;
    if (!of[i].dtype(dtype) || !of[i].contiguous()) return false;
    number = dtype == DType::f32 ? Number::f32 : dtype == DType::bf16 ? Number::bf16 : Number::f16;
    return true;
  }
  bool floats(int i) const {
    Number number;
    return numbers(i, number) && number == Number::f32;
  }
};

// The power of two of which `codes` make so many groups; of one group, the least.
bool group_of(int64_t codes, int64_t groups, int64_t& out) {
  for (out = 1; ceil_div(codes, out) > groups && out < codes;) out *= 2;
  return ceil_div(codes, out) == groups;
}

// The length of so many groups of one length. No codes may have no group.
bool equal_groups(int64_t codes, int64_t groups, int64_t& length) {
  length = codes == 0 ? 1 : groups < 1 ? 0 : codes / groups;
  return length > 0 && (codes == 0 || codes % groups == 0);
}

// nf4, fp4: codes, absmax; or codes, absmax in 8 bits, their values, the absmax of those, an offset.
bool read_flat4(const Tensors& t, Quantised& q) {
  const int64_t codes = q.N * q.K, groups = t.count > 1 ? t.of[1].elements() : 0;
  if ((t.count != 2 && t.count != 5) || !t.bytes(0, ceil_div(codes, 2)) || !group_of(codes, groups, q.group))
    return false;
  q.flat = true;
  if (t.count == 2) return t.numbers(1, q.number) && q.number == Number::f32;
  if (!t.bytes(1, groups) || !t.floats(2) || t.of[2].elements() != 256 || !t.floats(3) || !t.floats(4) ||
      t.of[4].elements() != 1 || !group_of(groups, t.of[3].elements(), q.outer_group))
    return false;
  q.number = Number::nested;
  q.book = static_cast<const float*>(t.of[2].data);
  q.outer = static_cast<const float*>(t.of[3].data);
  q.offset = static_cast<const float*>(t.of[4].data);
  return true;
}

// Codes of 8 bits in rows of K, and scales: of each row, or (fp8) one, or of squares.
bool read_bytes(const Tensors& t, Quantised& q, uint8_t kind) {
  constexpr int64_t kSquare = 128;
  const View& c = t.of[0];
  if (t.count != 2 || c.kind != kind || c.bits != 8 || c.dims != 2 || c.shape[0] != q.N ||
      c.shape[1] != q.K || (q.K > 1 && c.strides[1] != 1) || (q.N > 1 && c.strides[0] < q.K) ||
      !t.numbers(1, q.number))
    return false;
  q.order = Order::bytes, q.row = q.N > 1 ? c.strides[0] : q.K, q.group = q.K, q.groups = 1;
  const View& s = t.of[1];
  // A row of squares may have as many as W has rows.
  if (s.elements() == q.N && (q.code == Code::int8 || s.dims == 1)) return true;
  if (q.code == Code::int8) return false;
  q.rows = q.N;
  if (s.elements() == 1) return true;
  q.rows = q.group = kSquare, q.groups = ceil_div(q.K, kSquare);
  return s.dims == 2 && s.shape[0] == ceil_div(q.N, kSquare) && s.shape[1] == q.groups;
}

// int4: codes (N, K / 2), signed or not, scales and zeros (N, K / group).
bool read_int4(const Tensors& t, Quantised& q) {
  Number zeros;
  q.code = t.of[0].kind == tensors::kInt ? Code::int4 : Code::uint4;
  if (t.count != 3 || !t.bytes(0, q.N * q.K / 2, q.code == Code::int4 ? tensors::kInt : kUint) ||
      q.K % 2 != 0 || t.of[1].dims != 2 || t.of[1].shape[0] != q.N || !t.numbers(1, q.number) ||
      !t.numbers(2, zeros) || zeros != q.number || t.of[2].elements() != t.of[1].elements())
    return false;
  q.groups = t.of[1].shape[1], q.zeros = t.of[2].data;
  return equal_groups(q.K, q.groups, q.group);
}

// hqq4, quanto4: codes of the two halves of W in the upper and the lower bits, or the other way round; scales
// and zeros by group.
bool read_halves(const Tensors& t, Quantised& q) {
  Number zeros;
  const int64_t codes = q.N * q.K, groups = t.count > 1 ? t.of[1].elements() : 0;
  if (t.count != 3 || codes % 2 != 0 || !t.bytes(0, codes / 2) || !t.numbers(1, q.number) ||
      !t.numbers(2, zeros) || zeros != q.number || t.of[2].elements() != groups)
    return false;
  q.flat = true, q.zeros = t.of[2].data;
  return equal_groups(codes, groups, q.group);
}

// mxfp4: codes (N, K / 32, 16), exponents (N, K / 32).
bool read_mxfp4(const Tensors& t, Quantised& q) {
  if (t.count != 2 || q.K % 32 != 0 || !t.bytes(0, q.N * q.K / 2) || !t.bytes(1, q.N * q.K / 32))
    return false;
  q.group = 32, q.groups = q.K / 32, q.number = Number::e8m0;
  return true;
}

// GGUF: blocks of 32, a scale in fp16 before the codes.
bool read_gguf(const Tensors& t, Quantised& q, int64_t block_bytes) {
  if (t.count != 1 || q.K % 32 != 0 || !t.bytes(0, q.N * q.K / 32 * block_bytes)) return false;
  q.flat = true, q.group = 32, q.block_bytes = block_bytes, q.number = Number::f16;
  return true;
}

}  // namespace

bool read_quantised(PyObject* word, PyObject* object, int64_t N, int64_t K, Quantised& q,
                    tensors::Device where) {
  Tensors t;
  const char* name = PyUnicode_Check(word) ? PyUnicode_AsUTF8(word) : nullptr;
  if (name == nullptr) PyErr_Clear();
  if (name == nullptr || !t.read(object, where)) return false;
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  q.N = N, q.K = q.row = K;
  q.codes = static_cast<const uint8_t*>(t.of[0].data);
  if (t.count > 1) q.scales = t.of[1].data;
  if (is("nf4") || is("fp4")) {
    q.code = is("nf4") ? Code::nf4 : Code::fp4;
    return read_flat4(t, q);
  }
  if (is("w8a8")) {
    q.code = Code::int8, q.integers = true;
    return std::max(N, K) <= cpu::kBaseInt8Terms && read_bytes(t, q, tensors::kInt);
  }
  if (is("int8") || is("fp8")) {
    const uint8_t kind = t.of[0].kind;
    q.code = kind == kE4m3 ? Code::e4m3 : kind == kE5m2 ? Code::e5m2 : Code::int8;
    return is("int8") == (q.code == Code::int8) && read_bytes(t, q, is("int8") ? tensors::kInt : kind);
  }
  if (is("int4")) {
    q.order = Order::lower_first;
    return read_int4(t, q);
  }
  if (is("hqq4") || is("quanto4")) {
    q.code = Code::uint4, q.order = is("hqq4") ? Order::halves_upper : Order::halves_lower;
    return read_halves(t, q);
  }
  if (is("mxfp4")) {
    q.code = Code::e2m1, q.order = Order::lower_first;
    return read_mxfp4(t, q);
  }
  q.scales = q.codes, q.codes += 2;
  if (is("q4_0")) {
    q.code = Code::minus8, q.order = Order::blocks_lower;
    return read_gguf(t, q, 18);
  }
  q.code = Code::int8, q.order = Order::bytes;
  return is("q8_0") && read_gguf(t, q, 34);
}

}  // namespace peftkern
