// Memory in large pages. Not for files that are compiled per level.
#pragma once

#include <cstddef>
#include <cstdint>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

namespace peftkern::cpu {

// Asks for the whole blocks of 2 MB in [p, p + bytes) to be large pages, before they are written: what is
// read once then costs no walk for every 4 KB. A wish: without the system's leave nothing changes.
inline void ask_huge_pages(void* p, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kBlock = uintptr_t{2} << 20;
  const uintptr_t at = reinterpret_cast<uintptr_t>(p), begin = (at + kBlock - 1) / kBlock * kBlock;
  const uintptr_t end = (at + bytes) / kBlock * kBlock;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(p), static_cast<void>(bytes);
#endif
}

}  // namespace peftkern::cpu
