"""CPU back end: C++ kernels for the low-rank branch and, where that is faster, for the base product."""

from __future__ import annotations

from ...bases.base import QUANTISED
from ...problem import Problem
from ...settings import Settings
from ..marshal import CODES
from . import block_rotate, bottleneck_adapter, lora_linear, lora_row_norm, multi_lora_linear, native

NAME = "cpu"
# Those that its kernels read.
BASES = ("dense", "identity", *QUANTISED)

# Ops whose problem has no activation.
_ANY_DTYPE = ("dropout_mask", "multi_lora_linear_route")


def unavailable(now: Settings) -> str | None:
    """Why no call can be taken, or None."""
    return "the C++ extension is not built: install peftkern with a C++ compiler" if native._C is None else None


def decline(problem: Problem, now: Settings) -> str | None:
    """Why this problem cannot be taken, or None."""
    if problem.op not in _ANY_DTYPE and problem.dtype not in CODES:
        return f"has kernels for float32, bfloat16 and float16, not {problem.dtype}"
    return block_rotate.decline(problem) if problem.op in block_rotate.OPS else None


OPS = {
    **block_rotate.OPS, **bottleneck_adapter.OPS, **lora_linear.OPS, **lora_row_norm.OPS,
    "dropout_mask": native.dropout_mask, **multi_lora_linear.OPS,
}  # fmt: skip
