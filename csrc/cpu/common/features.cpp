// What this CPU is and has that decides between the vendor's matrix product and ours.
#include <cstring>

#include "cpu/common/dispatch.h"
#include "peftkern/cpu.h"

#ifdef PEFTKERN_X86_LEVELS
#include <cpuid.h>
#endif
#ifdef PEFTKERN_HAVE_AVX512_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace peftkern::cpu {
namespace {

unsigned detect() {
  unsigned found = 0;
#ifdef PEFTKERN_X86_LEVELS
  found |= kX86;
  unsigned a = 0, b = 0, c = 0, d = 0;
  // "GenuineIntel" in the order ebx, edx, ecx.
  if (__get_cpuid(0, &a, &b, &c, &d) && b == 0x756e6547u && d == 0x49656e69u && c == 0x6c65746eu)
    found |= kIntel;
  // AVX-512 as a whole (and that the operating system saves its registers) is the level's question.
  const unsigned tiles = 1u << 24, products = 1u << 22;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    if ((~d & (tiles | products)) == 0) found |= kAmxBf16;
    if (c & (1u << 11)) found |= kAvx512Vnni;
  }
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    if (a & (1u << 5)) found |= kAvx512Bf16;
    if (a & (1u << 21)) found |= kAmxFp16;
  }
#endif
  return found;
}

CpuModel detect_model() {
  CpuModel found{};
#ifdef PEFTKERN_X86_LEVELS
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return found;
  std::memcpy(found.vendor, &b, 4);
  std::memcpy(found.vendor + 4, &d, 4);
  std::memcpy(found.vendor + 8, &c, 4);
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const int family = (a >> 8) & 15, model = (a >> 4) & 15;
  // The extended fields count where the short ones have run out.
  found.family = family == 15 ? family + ((a >> 20) & 255) : family;
  found.model = family == 15 || family == 6 ? model + (((a >> 16) & 15) << 4) : model;
#endif
  return found;
}

}  // namespace

unsigned features() {
  // Asked once: virtual machines take tens of microseconds to answer CPUID, and every product asks.
  static const unsigned found = detect();
  return found;
}

const CpuModel& cpu_model() {
  static const CpuModel found = detect_model();
  return found;
}

bool base_gemm_bf16_usable() {
#ifdef PEFTKERN_HAVE_AVX512_BF16
  return level() == Level::avx512 && (features() & kAvx512Bf16) != 0;
#else
  return false;
#endif
}

bool base_gemm_amx_usable() {
#ifdef PEFTKERN_HAVE_AVX512_AMX
  if (!base_gemm_bf16_usable() || (features() & kAmxBf16) == 0) return false;
  // Linux saves the registers of a process that has asked for them: ARCH_REQ_XCOMP_PERM, of XTILEDATA.
  static const bool permitted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return permitted;
#else
  return false;
#endif
}

#ifdef PEFTKERN_HAVE_AVX512_AMX
namespace avx512_amx {
void base_gemm_amx(const BaseArgs&);
}  // namespace avx512_amx
void base_gemm_amx(const BaseArgs& args) {
  avx512_amx::base_gemm_amx(args);
}
#else
void base_gemm_amx(const BaseArgs&) {}
#endif

#ifdef PEFTKERN_HAVE_AVX512_BF16
namespace avx512_bf16 {
void base_gemm_bf16(const BaseArgs&);
void base_few_bf16(const BaseArgs&);
void fma_peak(const PeakArgs&);
}  // namespace avx512_bf16
void base_gemm_bf16(const BaseArgs& args) {
  avx512_bf16::base_gemm_bf16(args);
}
void base_few_bf16(const BaseArgs& args) {
  avx512_bf16::base_few_bf16(args);
}
void fma_peak_bf16(const PeakArgs& args) {
  avx512_bf16::fma_peak(args);
}
#else
void base_gemm_bf16(const BaseArgs&) {}
void base_few_bf16(const BaseArgs&) {}
void fma_peak_bf16(const PeakArgs&) {}
#endif

}  // namespace peftkern::cpu

PEFTKERN_DISPATCH(base_gemm, BaseArgs)
PEFTKERN_DISPATCH(base_gemm_amx_stated, BaseArgs)
PEFTKERN_DISPATCH(base_few, BaseArgs)
PEFTKERN_DISPATCH(fma_peak, PeakArgs)
PEFTKERN_DISPATCH(round_rows, RoundRowsArgs)
PEFTKERN_DISPATCH(decode_part, DecodePartArgs)
PEFTKERN_DISPATCH_LOCAL(base_gemm_int8_run, BaseArgs)

namespace peftkern::cpu {
#ifdef PEFTKERN_HAVE_AVX512_VNNI
namespace avx512_vnni {
void base_gemm_int8_run(const BaseArgs&);
}
#endif
void base_gemm_int8(const BaseArgs& args) {
#ifdef PEFTKERN_HAVE_AVX512_VNNI
  if (level() == Level::avx512 && (features() & kAvx512Vnni) != 0)
    return avx512_vnni::base_gemm_int8_run(args);
#endif
  base_gemm_int8_run(args);
}
}  // namespace peftkern::cpu
