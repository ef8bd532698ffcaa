// Sizes of this CPU's caches. Not for files that are compiled per level.
#pragma once

#include <algorithm>
#include <cstdint>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

namespace peftkern::cpu {

// Of a core's second-level cache, asked once; where the system does not say, what most have.
inline int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  constexpr int64_t found = 0;
#endif
  return found > 0 ? std::clamp<int64_t>(found, 256 << 10, 2 << 20) : 512 << 10;
}

}  // namespace peftkern::cpu
