// Scratch of one call, for launchers: not for files that are compiled per level.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "peftkern/cpu.h"

namespace peftkern::cpu {

// Floats that the partial sums of one call may take: 32 MB.
constexpr int64_t kMaxScratchFloats = int64_t{1} << 23;

struct Free {
  void operator()(float* p) const { std::free(p); }
};

inline std::unique_ptr<float, Free> allocate(int64_t floats) {
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
  float* p = static_cast<float*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64)));
  if (p == nullptr) throw std::bad_alloc();
  return std::unique_ptr<float, Free>(p);
}

// How many parts `rows` rows are summed in, `part` rows each or more, when each part needs `floats` of
// scratch: a function of sizes alone.
inline int64_t part_count(int64_t rows, int64_t part, int64_t floats) {
  const int64_t fit = kMaxScratchFloats / std::max<int64_t>(floats, 1), most = 32;
  return std::clamp<int64_t>(std::min(rows / part, fit), 1, most);
}

inline int64_t padded(int64_t columns) {
  return (columns + kPadColumns - 1) / kPadColumns * kPadColumns;
}

}  // namespace peftkern::cpu
