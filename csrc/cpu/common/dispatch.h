// Choice of the instruction set level for functions that are compiled once per level.
#pragma once

namespace peftkern::cpu {

enum class Level : int { plain = 0, avx2 = 1, avx512 = 2 };

// The level in use (isa.cpp).
Level level();

}  // namespace peftkern::cpu

// PEFTKERN_DISPATCH declares peftkern::cpu::<level>::NAME for every level and defines peftkern::cpu::NAME,
// which calls the one in use; PEFTKERN_DISPATCH_LOCAL defines it for this file alone. At global scope of a
// file compiled once.
#ifdef PEFTKERN_X86_LEVELS
#define PEFTKERN_DISPATCH_AS(LINKAGE, NAME, ARGS) \
  namespace peftkern::cpu::plain {                \
  void NAME(const ARGS&);                         \
  }                                               \
  namespace peftkern::cpu::avx2 {                 \
  void NAME(const ARGS&);                         \
  }                                               \
  namespace peftkern::cpu::avx512 {               \
  void NAME(const ARGS&);                         \
  }                                               \
  namespace peftkern::cpu {                       \
  LINKAGE void NAME(const ARGS& args) {           \
    switch (level()) {                            \
      case Level::avx512:                         \
        return avx512::NAME(args);                \
      case Level::avx2:                           \
        return avx2::NAME(args);                  \
      default:                                    \
        return plain::NAME(args);                 \
    }                                             \
  }                                               \
  }
#else
#define PEFTKERN_DISPATCH_AS(LINKAGE, NAME, ARGS) \
  namespace peftkern::cpu::plain {                \
  void NAME(const ARGS&);                         \
  }                                               \
  namespace peftkern::cpu {                       \
  LINKAGE void NAME(const ARGS& args) {           \
    plain::NAME(args);                            \
  }                                               \
  }
#endif
#define PEFTKERN_DISPATCH(NAME, ARGS) PEFTKERN_DISPATCH_AS(, NAME, ARGS)
#define PEFTKERN_DISPATCH_LOCAL(NAME, ARGS) PEFTKERN_DISPATCH_AS(static, NAME, ARGS)
