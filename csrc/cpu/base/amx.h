// The instructions of AMX that products of bf16 need, a function each: the instruction itself in a file that
// is compiled for them, elsewhere its definition, as Intel's manual has it, in C++ for any machine.
#pragma once

#include <cstring>

#include "cpu/common/simd.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// Rows of a register, and its columns of 4 bytes, at most.
constexpr int kTileSide = 16;
constexpr int kTileRegisters = 8;

// The shapes of all registers, in the layout that LDTILECFG reads.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};

  void set(int which, int height, int width) {
    rows[which] = static_cast<uint8_t>(height), bytes[which] = static_cast<uint16_t>(4 * width);
  }
};
static_assert(sizeof(TileShapes) == 64, "what LDTILECFG reads");

#if defined(__AMX_BF16__)

// The registers of this thread.
class Tiles {
 public:
  // All registers are zero after it, unless they have these shapes already.
  static void configure(const TileShapes& shapes) {
    if (std::memcmp(&current(), &shapes, sizeof shapes) == 0) return;
    current() = shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  template <int T>
  PEFTKERN_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  // Rows `step` bytes apart.
  template <int T>
  PEFTKERN_INLINE void load(const void* from, int64_t step) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(step), "i"(T) : "memory");
  }
  template <int T>
  PEFTKERN_INLINE void store(void* to, int64_t step) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(step), "i"(T) : "memory");
  }
  // SUMS (m x n, fp32) += A (m x k pairs) B (k pairs x n), pairs of bf16.
  template <int SUMS, int A, int B>
  PEFTKERN_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
  }
  // The operating system need not save them any more.
  static void release() {
    current() = TileShapes{0};
    asm volatile("tilerelease");
  }

 private:
  static TileShapes& current() {
    static thread_local TileShapes shapes{0};
    return shapes;
  }
};

#else

// The same; where the CPU would fault, for shapes that do not fit, the process ends as well.
class Tiles {
 public:
  void configure(const TileShapes& shapes) {
    shapes_ = shapes;
    std::memset(of_, 0, sizeof of_);
  }
  template <int T>
  void zero() {
    require(shapes_.rows[T] > 0);
    std::memset(of_[T], 0, sizeof of_[T]);
  }
  template <int T>
  void load(const void* from, int64_t step) {
    zero<T>();
    for (int i = 0; i < shapes_.rows[T]; ++i)
      std::memcpy(of_[T][i], static_cast<const char*>(from) + i * step, shapes_.bytes[T]);
  }
  template <int T>
  void store(void* to, int64_t step) const {
    require(shapes_.rows[T] > 0);
    for (int i = 0; i < shapes_.rows[T]; ++i)
      std::memcpy(static_cast<char*>(to) + i * step, of_[T][i], shapes_.bytes[T]);
  }
  // The even terms of all pairs are one chain of fused multiply-adds, the odd ones another; their sum is
  // added to what stands there. Rounded to nearest even; what is below the normal range counts as zero, terms
  // and results alike.
  template <int SUMS, int A, int B>
  void multiply() {
    const int rows = shapes_.rows[SUMS], cols = shapes_.bytes[SUMS] / 4, pairs = shapes_.rows[B];
    require(rows == shapes_.rows[A] && cols == shapes_.bytes[B] / 4 && pairs == shapes_.bytes[A] / 4);
    require(rows > 0 && pairs > 0);
    for (int i = 0; i < rows; ++i)
      for (int c = 0; c < cols; ++c) {
        float even = 0.0f, odd = 0.0f;
        for (int k = 0; k < pairs; ++k) {
          const uint32_t x = of_[A][i][k], y = of_[B][k][c];
          even = flushed(__builtin_fmaf(flushed(number(x << 16)), flushed(number(y << 16)), even));
          odd = flushed(
              __builtin_fmaf(flushed(number(x & 0xffff0000u)), flushed(number(y & 0xffff0000u)), odd));
        }
        const float sum = flushed(flushed(number(of_[SUMS][i][c])) + flushed(even + odd));
        std::memcpy(&of_[SUMS][i][c], &sum, sizeof sum);
      }
  }
  static void release() {}

 private:
  static void require(bool fits) {
    if (!fits) __builtin_trap();
  }
  static float number(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  static float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

  TileShapes shapes_{0};
  uint32_t of_[kTileRegisters][kTileSide][kTileSide];
};

#endif

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
