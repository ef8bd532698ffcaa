// Tensor-core products of a warpgroup, four warps, on operands in shared memory (sm_90a).
//
// D (64 x N, fp32) += A (64 x 16) B (16 x N). Warp w of the group holds rows 16 w to 16 w + 15 of D: lane l
// has in register i row l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2. A may lie in registers,
// as in mma.h. Registers given to wgmma may be touched again after wgmma_wait only.
#pragma once

#include "cuda/instructions/device.h"
#include "peftkern/types.h"

namespace peftkern::cuda {

// Says where an operand lies: atoms of 8 rows of 128 bytes, swizzled as by tile_load, each aligned to 1024
// bytes. Where the dimension of K is contiguous: `stride` bytes from 8 rows to the next 8, `leading` unused;
// a step of 16 along K adds 32 bytes to the address. Where M or N is contiguous: `leading` bytes from 64 of
// them to the next 64, `stride` bytes from 8 rows of K to the next 8.
PEFTKERN_DEVICE uint64_t wgmma_descriptor(uint32_t address, uint32_t stride, uint32_t leading = 16) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32 |
         uint64_t{1} << 62;
}

}  // namespace peftkern::cuda

#ifdef PEFTKERN_SIM
#include "sim/instructions/wgmma.h"
#else

namespace peftkern::cuda {

// Before the first wgmma, and before one whose registers were touched by anything else.
PEFTKERN_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
PEFTKERN_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most Left groups are under way.
template <int Left>
PEFTKERN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}

// clang-format off
// Lists of operands.
#define PEFTKERN_LIST_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PEFTKERN_LIST_16 PEFTKERN_LIST_8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PEFTKERN_LIST_32 PEFTKERN_LIST_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23" \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define PEFTKERN_LIST_64 PEFTKERN_LIST_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39" \
  ", %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55" \
  ", %56, %57, %58, %59, %60, %61, %62, %63"
#define PEFTKERN_LIST_128 PEFTKERN_LIST_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71" \
  ", %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87" \
  ", %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103" \
  ", %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119" \
  ", %120, %121, %122, %123, %124, %125, %126, %127"
#define PEFTKERN_OUT_8(i) "+f"(d[i + 0]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define PEFTKERN_OUT_16(i) PEFTKERN_OUT_8(i), PEFTKERN_OUT_8(i + 8)
#define PEFTKERN_OUT_32(i) PEFTKERN_OUT_16(i), PEFTKERN_OUT_16(i + 16)
#define PEFTKERN_OUT_64(i) PEFTKERN_OUT_32(i), PEFTKERN_OUT_32(i + 32)
#define PEFTKERN_OUT_128(i) PEFTKERN_OUT_64(i), PEFTKERN_OUT_64(i + 64)

// Operands after D's registers: descriptor or four registers of A, descriptor of B, accumulate, which are columns.
#define PEFTKERN_WGMMA_SHARED(N, REGISTERS, TYPE, A, B, S, TA, TB)                                                   \
  asm volatile(                                                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %" #S ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE   \
      " {" PEFTKERN_LIST_##REGISTERS "}, %" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB ";\n}"                           \
      : PEFTKERN_OUT_##REGISTERS(0)                                                                                  \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(ColumnsA)),                          \
        "n"(static_cast<int>(ColumnsB)))
#define PEFTKERN_WGMMA_REGISTERS(N, REGISTERS, TYPE, A, B, C, D, E, S, TB)                                           \
  asm volatile(                                                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %" #S ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE   \
      " {" PEFTKERN_LIST_##REGISTERS "}, {%" #A ", %" #B ", %" #C ", %" #D "}, %" #E ", p, 1, 1, %" #TB ";\n}"        \
      : PEFTKERN_OUT_##REGISTERS(0)                                                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),                       \
        "n"(static_cast<int>(ColumnsB)))
// clang-format on

namespace detail {

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

}  // namespace detail

// T is bf16 or f16, N 16, 32, 64, 128 or 256; a and b are descriptors. accumulate = false ignores what d
// holds.
template <class T, int N, bool ColumnsA = false, bool ColumnsB = false>
PEFTKERN_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 16 || N == 32 || N == 64 || N == 128 || N == 256);
  if constexpr (N == 16 && detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_SHARED(16, 8, "bf16", 8, 9, 10, 11, 12);
  } else if constexpr (N == 16 && !detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_SHARED(16, 8, "f16", 8, 9, 10, 11, 12);
  } else if constexpr (N == 32 && detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_SHARED(32, 16, "bf16", 16, 17, 18, 19, 20);
  } else if constexpr (N == 32 && !detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_SHARED(32, 16, "f16", 16, 17, 18, 19, 20);
  } else if constexpr (N == 64 && detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_SHARED(64, 32, "bf16", 32, 33, 34, 35, 36);
  } else if constexpr (N == 64 && !detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_SHARED(64, 32, "f16", 32, 33, 34, 35, 36);
  } else if constexpr (N == 128 && detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_SHARED(128, 64, "bf16", 64, 65, 66, 67, 68);
  } else if constexpr (N == 128 && !detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_SHARED(128, 64, "f16", 64, 65, 66, 67, 68);
  } else if constexpr (N == 256 && detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_SHARED(256, 128, "bf16", 128, 129, 130, 131, 132);
  } else if constexpr (N == 256 && !detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_SHARED(256, 128, "f16", 128, 129, 130, 131, 132);
  }
}

// A from registers.
template <class T, int N, bool ColumnsB = false>
PEFTKERN_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(N == 16 || N == 32 || N == 64 || N == 128 || N == 256);
  if constexpr (N == 16 && detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_REGISTERS(16, 8, "bf16", 8, 9, 10, 11, 12, 13, 14);
  } else if constexpr (N == 16 && !detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_REGISTERS(16, 8, "f16", 8, 9, 10, 11, 12, 13, 14);
  } else if constexpr (N == 32 && detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_REGISTERS(32, 16, "bf16", 16, 17, 18, 19, 20, 21, 22);
  } else if constexpr (N == 32 && !detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_REGISTERS(32, 16, "f16", 16, 17, 18, 19, 20, 21, 22);
  } else if constexpr (N == 64 && detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_REGISTERS(64, 32, "bf16", 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (N == 64 && !detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_REGISTERS(64, 32, "f16", 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (N == 128 && detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_REGISTERS(128, 64, "bf16", 64, 65, 66, 67, 68, 69, 70);
  } else if constexpr (N == 128 && !detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_REGISTERS(128, 64, "f16", 64, 65, 66, 67, 68, 69, 70);
  } else if constexpr (N == 256 && detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_REGISTERS(256, 128, "bf16", 128, 129, 130, 131, 132, 133, 134);
  } else if constexpr (N == 256 && !detail::kIsBf16<T>) {
    PEFTKERN_WGMMA_REGISTERS(256, 128, "f16", 128, 129, 130, 131, 132, 133, 134);
  }
}

}  // namespace peftkern::cuda
#endif
