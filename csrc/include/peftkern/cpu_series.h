// Series of small skew-symmetric matrices on the CPU: what OFT makes the rotations of its blocks of.
#pragma once

#include <cstdint>

namespace peftkern::cpu {

// R_g = sum_k c[k] Q_g^k, size x size, with Q_g = U_g - U_g^T, where U_g has upper[g, e] at (rows[e],
// cols[e]) for each e < elements, and 0 elsewhere. upper (blocks x elements), d and out are contiguous; sizes
// up to kMaxBlock.
struct SkewSeriesArgs {
  const float* upper;
  const int64_t *rows, *cols;
  int64_t blocks, size, elements;
  const float* c;  // 2 * pairs + 1 of them, pairs >= 2
  int64_t pairs;
  const float* d;  // gradient of R: then out is that of upper, else R
  float* out;
  int threads;
};
void skew_series(const SkewSeriesArgs& args);

}  // namespace peftkern::cpu
