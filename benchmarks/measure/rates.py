"""What a CPU can do at most: FLOPs of multiply-adds in registers, bytes of a copy."""

from __future__ import annotations

import time

import torch

from peftkern.backends.cpu import native

from .timing import copy_bandwidth

# Steps of a few vectors each: some milliseconds, so that starting threads is not felt.
_STEPS, _TIMES = 1 << 20, 15


def fma_peak(dtype: torch.dtype, threads: int) -> float | None:
    """FLOPs per second of products of this dtype with sums in fp32: the best of some, for a bound is what can be reached.

    None without C++ kernels. fp16, and bf16 on a CPU without instructions for it, are widened: their peak is that of fp32.
    """
    if native._C is None:
        return None
    pairs, best = dtype == torch.bfloat16 and native._C.base_gemm_bf16_usable(), 0.0
    for _ in range(_TIMES):
        start = time.perf_counter()
        flops = native._C.fma_peak(pairs, _STEPS, threads)
        best = max(best, flops / (time.perf_counter() - start))
    return best


def cpu_rates() -> dict:
    """Those of this CPU with torch's threads, and of one: GFLOP/s by dtype, GB/s."""
    many = torch.get_num_threads()
    peaks = {
        name: {str(n): round(fma_peak(dtype, n) / 1e9, 1) for n in sorted({1, many})}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    return {"fma_gflop_per_s": peaks, "copy_gb_per_s": round(copy_bandwidth("cpu") / 1e9, 2)}
