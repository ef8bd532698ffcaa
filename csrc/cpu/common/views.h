// Parts of matrices, and how many threads work is worth. Not for files that are compiled per level.
#pragma once

#include <cstring>

#include "peftkern/types.h"

namespace peftkern::cpu {

// Below this many multiply-adds, waking a second thread costs more than it saves.
constexpr int64_t kSerialWork = int64_t{1} << 17;

inline int worth_threads(int64_t work, int threads) {
  return work > kSerialWork ? threads : 1;
}

inline int64_t element_size(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

inline ConstMatrix as_const(const Matrix& m) {
  return {m.data, m.dtype, m.row, m.col};
}

// The part from (row, col) on.
inline ConstMatrix from(const ConstMatrix& m, int64_t row, int64_t col) {
  const int64_t offset = (row * m.row + col * m.col) * element_size(m.dtype);
  return {static_cast<const char*>(m.data) + offset, m.dtype, m.row, m.col};
}
inline Matrix from(const Matrix& m, int64_t row, int64_t col) {
  const int64_t offset = (row * m.row + col * m.col) * element_size(m.dtype);
  return {static_cast<char*>(m.data) + offset, m.dtype, m.row, m.col};
}

inline ConstMatrix transposed(const ConstMatrix& m) {
  return {m.data, m.dtype, m.col, m.row};
}
inline Matrix transposed(const Matrix& m) {
  return {m.data, m.dtype, m.col, m.row};
}

// Of a matrix with contiguous rows.
inline void zero_rows(const Matrix& m, int64_t rows, int64_t cols) {
  const auto bytes = static_cast<size_t>(cols * element_size(m.dtype));
  for (int64_t i = 0; i < rows; ++i) std::memset(from(m, i, 0).data, 0, bytes);
}

}  // namespace peftkern::cpu
