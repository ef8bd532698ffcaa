// Host bodies of cuda/mma.h.
#pragma once

#include <cstring>

#include "cuda/instructions/convert.h"
#include "sim/instructions/device.h"

namespace peftkern::cuda {
namespace detail {

struct MatrixLoad {
  uint32_t* words;
  uint32_t address;
};

template <int Count, bool Transposed>
void load_matrices_together(void* const* operands, uint32_t) {
  for (int i = 0; i < Count; ++i) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      const uint32_t address = static_cast<MatrixLoad*>(operands[8 * i + row])->address;
      std::memcpy(matrix[row], ::sim::shared_pointer(::sim::self->block, address, 16, 16, "ldmatrix"), 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t low = Transposed ? matrix[column][row] : matrix[row][column];
      const uint32_t high = Transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      static_cast<MatrixLoad*>(operands[lane])->words[i] = low | high << 16;
    }
  }
}

template <class T>
float half_of(uint32_t word, int which) {
  T value;
  value.bits = static_cast<uint16_t>(word >> 16 * which);
  return to_float(value);
}

struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

template <class T>
void mma_together(void* const* operands, uint32_t) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<const Mma*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = half_of<T>(mine->a[i], half);
      for (int i = 0; i < 2; ++i) b[2 * t + half + 8 * i][g] = half_of<T>(mine->b[i], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<const Mma*>(operands[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      d[i] += sum;
    }
  }
}

}  // namespace detail

template <int Count, bool Transposed = false>
PEFTKERN_DEVICE void load_matrices(uint32_t (&words)[Count], uint32_t address) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  detail::MatrixLoad mine{words, address};
  ::sim::meet("ldmatrix", 0xffffffffu, &mine, detail::load_matrices_together<Count, Transposed>);
}

template <class T>
PEFTKERN_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  detail::Mma mine{d, a, b};
  ::sim::meet("mma", 0xffffffffu, &mine, detail::mma_together<T>);
}

}  // namespace peftkern::cuda
