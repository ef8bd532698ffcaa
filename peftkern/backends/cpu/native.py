"""The C++ extension: which processor and instruction set it runs on, in which blocks it works, and its dropout bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import settings
from ...problem import CpuWay

try:
    from ... import _C
except ImportError:
    _C = None

# Below this many elements, waking a second thread costs more than it saves.
_SERIAL_WORK = 1 << 17

# Most rows that the kernel for few rows takes.
FEW_ROWS = _C.base_few_rows if _C is not None else 0


class Level(NamedTuple):
    """The instruction sets in use, and whose fp32 product torch has: ours, torch's, whether it is MKL's."""

    isa: str
    torch_isa: str
    mkl: bool


def level() -> Level:
    """What is in use now."""
    return Level(_C.isa(), torch.backends.cpu.get_cpu_capability(), torch.backends.mkl.is_available())


def model() -> tuple[str, int, int]:
    """Vendor, family and model of this CPU."""
    return tuple(_C.cpu_model())


def facts(isa: str) -> tuple[Level, frozenset[str]]:
    """(level, features that decide which product is fast) with ``isa`` in use; ``bf16_kernel``, ``amx_kernel``: there is ours."""
    before = _C.isa()
    _C.set_isa(isa)
    try:
        ours = {"bf16_kernel": _C.base_gemm_bf16_usable(), "amx_kernel": _C.base_gemm_amx_usable()}
        return level(), frozenset(_C.features()) | {kernel for kernel, usable in ours.items() if usable}
    finally:
        _C.set_isa(before)


def use_isa(wanted: str) -> None:
    """Bring the kernels, if there are any, to an instruction set, a value of ``PEFTKERN_CPU_ISA``."""
    if _C is not None:
        _C.set_isa(wanted)


settings.follow(lambda now: use_isa(now.cpu_isa))


class Blocks(NamedTuple):
    """In which blocks a base product of ours is computed: ``rows`` x ``cols`` of the result are completed at a time."""

    rows: int
    cols: int
    # Floats: for the product, and for the block that it fills.
    scratch: int
    panel: int

    @property
    def bytes(self) -> int:
        """All scratch of the product."""
        return 4 * (self.scratch + self.panel)


def blocks(kind: str, M: int, D: int, C: int, threads: int) -> Blocks:
    """Those of an (M, C) x (C, D) product of ours; sizes at least 1."""
    return Blocks(*_C.base_blocks(kind, M, D, C, threads))


def dropout_mask(c, way: CpuWay) -> Tensor:
    """The keep bits of a seed as bool (M, K); see peftkern.ops.dropout_mask."""
    seed, M, K, p = c
    out = torch.empty((M, K), dtype=torch.bool)
    if out.numel():
        threads = torch.get_num_threads() if out.numel() > _SERIAL_WORK else 1
        _C.dropout_mask(int(seed.item()) & (2**64 - 1), int(p * 2.0**32), M, K, out.data_ptr(), threads)
    return out
