"""What a CPU can do at most: FLOPs of multiply-adds in registers, bytes of a copy."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from peftkern import doctor
from peftkern.backends.cpu import native
from peftkern.problem import short

from .timing import copy_bandwidth

# Steps of a few vectors each: some milliseconds, so that starting threads is not felt. For so many seconds: a system may take
# a while to give each thread a core of its own.
_STEPS, SECONDS = 1 << 20, 0.5
# Instructions that multiply a dtype faster than those which are timed here.
_FASTER = {torch.bfloat16: {"amx_bf16"}, torch.float16: {"amx_fp16", "avx512_fp16"}}


def fma_peaks(dtypes: Iterable[torch.dtype], threads: int) -> dict[str, float]:
    """FLOPs per second, by dtype, of products with sums in fp32: the best of some, for a bound is what can be reached.

    fp16, and bf16 on a CPU without instructions for it, are widened: their peak is that of fp32. A dtype has none without
    C++ kernels, and where the CPU has faster instructions, of which a peak would be no bound.
    """
    if native._C is None:
        return {}
    features = set(doctor.cpu()["features"])
    known = [dtype for dtype in dict.fromkeys(dtypes) if not features & _FASTER.get(dtype, set())]
    usable = native._C.base_gemm_bf16_usable()
    pairs = {dtype: usable and dtype == torch.bfloat16 for dtype in known}
    rates = {kind: _rate(kind, threads) for kind in set(pairs.values())}
    return {short(dtype): rates[kind] for dtype, kind in pairs.items()}


def _rate(pairs: bool, threads: int) -> float:
    best, end = 0.0, time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end:
        flops = native._C.fma_peak(pairs, _STEPS, threads)
        best = max(best, flops / (time.perf_counter() - start))
    return best


def cpu_rates() -> dict:
    """Those of this CPU with torch's threads, and of one: GFLOP/s by dtype, GB/s."""
    peaks: dict[str, dict[str, float]] = {}
    for threads in sorted({1, torch.get_num_threads()}):
        for name, rate in fma_peaks((torch.float32, torch.bfloat16), threads).items():
            peaks.setdefault(name, {})[str(threads)] = round(rate / 1e9, 1)
    return {"fma_gflop_per_s": peaks, "copy_gb_per_s": round(copy_bandwidth("cpu") / 1e9, 2)}
