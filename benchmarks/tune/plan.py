"""What the tuner measures, without a clock or a device: problems in order of importance, candidates of each.

A job is one op, pair of dtypes, N, K, R and number of rows, with or without dropout. Its candidates are named in
peftkern/tuned.py; beside them stands ``composition``, plain torch with the vendor's product and ``addmm_`` in the dtype
of x, which is what every choice has to beat. With fp32 adapters it is less exact than the op may be, so it is measured
there, but never chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from peftkern.kernels.configs import LaunchConfig, rank_block
from peftkern.problem import DTYPES, Problem

COMPOSITION = "composition"
DROPOUT_P = 0.1
OPS = {
    "lora_linear": ("lora_linear_fwd", "lora_linear_bwd"),
    "multi_lora_linear": ("sgmv_add", "multi_lora_linear_fwd"),
    "lora_row_norm": ("lora_row_norm",),
    "quantised": ("lora_linear_fwd", "lora_linear_bwd"),
}
# (N, K): square, up and down of an 8B model's MLP, and its narrow keys and values.
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
TRAINING_ROWS = (8192, 2048, 512, 128)
DECODE_ROWS = (64, 32, 8, 2)
# Where decoding a weight in codes tile by tile gives way to panels of it, and the kinds that are in use.
CODED_ROWS = (64, 128, 32, 256, 16)
CODED = ("nf4", "int8")
# Beside the kernel's own configuration, where products are large enough to care: for the chips with the most shared
# memory, and for all others.
CONFIGS = {
    90: (
        LaunchConfig(128, 128, 64, 16, warps=8, stages=4, tma=True),
        LaunchConfig(128, 256, 64, 16, warps=8, stages=3, tma=True),
    ),
    80: (LaunchConfig(128, 128, 32, 16, warps=4, stages=4), LaunchConfig(128, 64, 64, 16, warps=4, stages=3)),
}
CONFIG_ROWS = 2048


@dataclass(frozen=True)
class Job:
    """One problem. ``dtype`` and ``adapter_dtype`` are short words; ``base``: the kind of a weight in codes, else empty."""

    op: str
    dtype: str
    adapter_dtype: str
    dropout: bool
    M: int
    N: int
    K: int
    R: int
    base: str = ""

    def problem(self, arch: int) -> Problem:
        """As dispatch sees it."""
        flags = {"dropout"} if self.dropout else set()
        flags |= {"need_x", "need_A", "need_B"} if self.op == "lora_linear_bwd" else set()
        flags |= {"base"} if self.op == "multi_lora_linear_fwd" else set()
        flags |= {self.base} - {""}
        sizes = self.M, self.N, self.K, self.R
        return Problem(
            self.op, "cuda", f"sm_{arch}", DTYPES[self.dtype], DTYPES[self.adapter_dtype], *sizes, frozenset(flags)
        )

    @property
    def bytes_read(self) -> int:
        """Of the large operands of one call."""
        size = DTYPES[self.dtype].itemsize
        if self.op == "lora_row_norm":
            return size * self.N * self.K
        if self.op in OPS["multi_lora_linear"]:
            adapters = min(self.M, 64) * self.R * (self.N + self.K) * DTYPES[self.adapter_dtype].itemsize
            base = 0 if self.op == "sgmv_add" else size * self.N * self.K
            return base + adapters + size * self.M * (self.N + self.K)
        weight = {"": size, "nf4": 0.5, "int8": 1}[self.base] * self.N * self.K
        return int(weight) + size * self.M * (self.K if self.op == "lora_linear_fwd" else self.N + self.K)

    def __str__(self) -> str:
        drop = " dropout" if self.dropout else ""
        base = f" {self.base}" if self.base else ""
        return f"{self.op} {self.dtype}/{self.adapter_dtype} {self.M}x{self.N}x{self.K} R={self.R}{drop}{base}"


@dataclass(frozen=True)
class Candidate:
    """``label`` names its times. ``eligible``: may be chosen."""

    label: str
    name: str
    config: LaunchConfig | None = None
    eligible: bool = True


def _lora_linear(dtype: str, R: int) -> Iterator[Job]:
    kinds = [("fp32", True), (dtype, True), ("fp32", False), (dtype, False)]
    for M in TRAINING_ROWS:
        for adapter, dropout in kinds:
            for N, K in SHAPES:
                for op in OPS["lora_linear"]:
                    yield Job(op, dtype, adapter, dropout, M, N, K, R)
    for M in DECODE_ROWS:
        for adapter in ("fp32", dtype):
            for N, K in SHAPES:
                yield Job("lora_linear_fwd", dtype, adapter, False, M, N, K, R)


def _many(dtype: str, R: int) -> Iterator[Job]:
    for M in (*DECODE_ROWS, 512, 4096):
        for adapter in (dtype, "fp32"):
            for N, K in SHAPES:
                for op in OPS["multi_lora_linear"]:
                    yield Job(op, dtype, adapter, False, M, N, K, R)


def _row_norm(dtype: str, R: int) -> Iterator[Job]:
    for adapter in ("fp32", dtype):
        for N, K in SHAPES:
            yield Job("lora_row_norm", dtype, adapter, False, 0, N, K, R)


def _quantised(dtype: str, R: int) -> Iterator[Job]:
    for M in CODED_ROWS:
        for base in CODED:
            for N, K in SHAPES:
                for op in OPS["quantised"]:
                    yield Job(op, dtype, "fp32", False, M, N, K, R, base)


def jobs(op: str, *, dtypes=("bf16", "fp16"), ranks=(16, 64, 8, 32)) -> list[Job]:
    """All problems of an op, what matters most first: whoever stops early has measured that."""
    make = {
        "lora_linear": _lora_linear, "multi_lora_linear": _many, "lora_row_norm": _row_norm, "quantised": _quantised,
    }[op]  # fmt: skip
    return [job for R in ranks for dtype in dtypes for job in make(dtype, R)]


def candidates(job: Job, arch: int) -> list[Candidate]:
    """What is measured, the default first. Whether a kernel runs here shows when it is tried."""
    if job.base:
        return [Candidate(name, name) for name in ("fused", "epilogue", "cuda")]
    if job.op not in OPS["lora_linear"]:
        return [Candidate("triton", "triton"), Candidate("cuda", "cuda")]
    found = [Candidate(name, name) for name in ("epilogue", "fused", "cuda")]
    if job.op == "lora_linear_fwd":
        found.append(Candidate("overlap", "overlap"))
    # The kernels' own addmm_ path exists where the branch is neither dropped afterwards nor more exact than x.
    if job.adapter_dtype == job.dtype and not (job.dropout and job.op == "lora_linear_bwd"):
        found.append(Candidate("addmm", "addmm"))
    if job.M >= CONFIG_ROWS and job.adapter_dtype == "fp32":
        itemsize = DTYPES[job.dtype].itemsize
        large = arch in (90, 100, 103)
        for config in CONFIGS[90 if large else 80]:
            config = replace(config, rank=rank_block(job.R, 32 if large else 16))
            if config.invalid(itemsize, arch) is None:
                found.append(Candidate(f"fused {label(config)}", "fused", config))
    return [*found, Candidate(COMPOSITION, COMPOSITION, eligible=False)]


def label(config: LaunchConfig) -> str:
    """``128x256x64 w8 s3``."""
    return f"{config.block_m}x{config.block_c}x{config.block_k} w{config.warps} s{config.stages}"


def copies(job: Job, cache_bytes: int) -> int:
    """Sets of inputs to take turns over, so that none is found in a cache twice its size: 2 to 32."""
    return max(2, min(32, -(-2 * cache_bytes // max(job.bytes_read, 1))))


def fastest(times: Mapping[str, float], eligible: list[str]) -> str:
    """The label of the least time among those that may be chosen and were measured; the earlier of equals."""
    measured = [name for name in eligible if name in times]
    if not measured:
        raise ValueError(f"none of {', '.join(eligible)} was measured")
    return min(measured, key=lambda name: times[name])
