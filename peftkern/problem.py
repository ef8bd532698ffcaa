"""A call reduced to what decides how it is run, and what a back end is told of that: printable, hashable, free of tensors."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .settings import Settings

# The words for dtypes in tables, results and on command lines.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


def short(dtype: torch.dtype | None) -> str | None:
    """``torch.bfloat16`` as ``bf16``; None of a dtype without a word."""
    return _WORDS.get(dtype)


@functools.cache
def device_arch(device_type: str, index: int | None) -> str:
    """``sm_90`` and the like for CUDA, torch's own word (``AVX2``, ``AVX512``, ``DEFAULT``) for CPU, else the type."""
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability(index)
        return f"sm_{major}{minor}"
    if device_type == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    return device_type


@dataclass(frozen=True)
class Problem:
    """One call of an op. Sizes: M rows, K in_features, N out_features, R rank (0 where an op has no such size).

    ``flags`` names the optional parts that are present (``bias``, ``dropout``, a vector by its symbol, ...).
    """

    op: str
    device: str
    arch: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype | None
    M: int
    N: int
    K: int
    R: int
    flags: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        adapter = str(self.adapter_dtype).removeprefix("torch.")
        flags = ",".join(sorted(self.flags)) or "-"
        sizes = f"M={self.M} N={self.N} K={self.K} R={self.R}"
        return f"{self.op}[{self.device}:{self.arch} {dtype} adapters={adapter} {sizes} {flags}]"


class CpuWay(NamedTuple):
    """How the CPU back end computes a call (dispatch/cpu_base.py).

    ``now``: the settings of the call, under which native calls remember it. ``kind``: who computes the base product,
    empty for an op without one; ``strided``: who does where W is adjacent along neither dimension, which a problem
    does not tell. ``pairs``: whether the branch is computed by products of bf16.
    """

    now: Settings = Settings()
    kind: str = ""
    strided: str = ""
    pairs: bool = False


class TritonWay(NamedTuple):
    """How the Triton back end computes a call. ``fixed``: answers that replace those of kernels/tl/configs.py, by name."""

    batch_invariant: bool = False
    fixed: tuple[tuple[str, object], ...] = ()


def problem_like(
    t: torch.Tensor, op: str, adapter_dtype: torch.dtype | None, sizes: tuple[int, int, int, int], present: dict
) -> Problem:
    """A problem on the device and in the dtype of ``t``; sizes M, N, K, R; flags: the names of what ``present`` has."""
    device = t.device
    flags = frozenset(name for name, value in present.items() if value is not None and value is not False)
    return Problem(op, device.type, device_arch(device.type, device.index), t.dtype, adapter_dtype, *sizes, flags)
