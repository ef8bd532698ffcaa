// How many blocks a launch is cut into.
#pragma once

#include <cstdint>

namespace peftkern::cuda {

// Into how many ranges, at least 1 and at most `most`, each of `tiles` tiles is cut: the fewest with which
// blocks fill the waves of a chip that holds `slots` of them, or nearly. `slots` is a constant of the kernel,
// so that results do not depend on the chip.
inline int64_t ranges_that_fill(int64_t tiles, int64_t most, int64_t slots) {
  int64_t best = 1;
  double best_full = 0;
  for (int64_t ranges = 1; ranges <= most && best_full < 0.9; ++ranges) {
    const int64_t blocks = ranges * tiles, waves = (blocks + slots - 1) / slots;
    const double full = waves == 0 ? 1 : static_cast<double>(blocks) / static_cast<double>(waves * slots);
    if (full <= best_full) continue;
    best_full = full;
    best = ranges;
  }
  return best;
}

}  // namespace peftkern::cuda
