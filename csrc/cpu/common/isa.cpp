// Which instruction sets this CPU has, which one is in use, and the dispatch of every function compiled per
// level.
#include <atomic>
#include <cstring>

#include "cpu/common/dispatch.h"
#include "peftkern/cpu.h"

#ifdef PEFTKERN_X86_LEVELS
#include <cpuid.h>
#endif

namespace peftkern::cpu {
namespace {

constexpr const char* kNames[] = {"plain", "avx2", "avx512"};

Level best_level() {
#ifdef PEFTKERN_X86_LEVELS
  // __builtin_cpu_supports also asks whether the operating system saves the registers; f16c it may not know
  // by name.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29));
  if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Level::plain;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? Level::avx512 : Level::avx2;
#else
  return Level::plain;
#endif
}

std::atomic<Level>& current() {
  static std::atomic<Level> value{best_level()};
  return value;
}

}  // namespace

Level level() {
  return current().load(std::memory_order_relaxed);
}

const char* isa() {
  return kNames[static_cast<int>(level())];
}

bool set_isa(const char* name) {
  const Level best = best_level();
  if (std::strcmp(name, "auto") == 0) {
    current().store(best, std::memory_order_relaxed);
    return true;
  }
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      current().store(static_cast<Level>(i), std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace peftkern::cpu
