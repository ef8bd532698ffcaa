// What native entry points share: dtype codes and plain views. No functions here: files that are compiled
// once per instruction set must not share inline code.
#pragma once

#include <cstdint>

namespace peftkern {

// Codes that the bindings pass as int.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Storage of the half precision types: bits only.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// A matrix in memory, element (i, j) at data + i * row + j * col.
struct ConstMatrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t row = 0, col = 1;
};
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t row = 0, col = 1;
};

// The equation's vectors (peftkern/equation.py), of the rank, of the input and of the output, each for base
// and delta. V: a pointer or a view; absent if null.
template <class V>
struct Scales {
  V d{}, p_b{}, p_d{}, g_b{}, g_d{};
};

// The activations of a bottleneck, in the order of peftkern/activations.py.
enum class Activation : int { identity, relu, leaky_relu, gelu, gelu_tanh, silu, tanh, sigmoid };
constexpr int kActivations = 8;

// Dropout of element (row0 + i, col0 + j): kept iff its Philox word is >= threshold. threshold 0 keeps
// everything.
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;
  int64_t row0 = 0;
  int64_t col0 = 0;
};

}  // namespace peftkern
