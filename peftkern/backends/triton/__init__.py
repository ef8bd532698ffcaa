"""Triton on CUDA devices, or on CPU tensors where ``TRITON_INTERPRET=1`` turns on Triton's interpreter."""

from __future__ import annotations

import functools
import importlib.util

import torch

from ...problem import Problem, TritonWay
from ...settings import Settings
from . import block_rotate, bottleneck_adapter, lora_linear, lora_row_norm, multi_lora_linear, operand
from .device import on_device

NAME = "triton"
BASES = operand.KINDS  # that its kernels read
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LIMIT = 2**31


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _old_devices() -> str | None:
    old = [i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(i) < (8, 0)]
    return f"CUDA device {old[0]} is older than sm_80" if old else None


def unavailable(now: Settings) -> str | None:
    """Why no call can run here, None if some can."""
    if not _installed():
        return "the package triton is not installed"
    if now.triton_interpret:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device, and TRITON_INTERPRET is not set"
    return _old_devices()


def decline(problem: Problem, now: Settings) -> str | None:
    """Why this call can't be taken, None if it can."""
    wanted = "cpu" if now.triton_interpret else "cuda"
    if problem.device != wanted:
        return f"runs on {wanted} tensors here, got {problem.device}"
    if problem.op in ("dropout_mask", "multi_lora_linear_route"):
        return None
    if problem.dtype not in _DTYPES:
        return f"no kernel for {problem.dtype}"
    if "curved" in problem.flags:
        return "no kernel for adapters with an activation or a bias of the rank"
    if problem.flags & operand.QUANTISED and 0 in (problem.N, problem.K):
        return "no kernel for codes of which there are none"
    if max(problem.M, problem.N, problem.K, problem.R) >= _LIMIT:
        return "a size is 2^31 or more"
    return None


def dropout_mask(c, way: TritonWay):
    """bool (M, K), see ``peftkern.ops.dropout_mask``."""
    from ...kernels.dropout import dropout_mask as launch_mask

    with on_device(c.seed):
        return launch_mask(*c)


OPS = {
    **block_rotate.OPS,
    **bottleneck_adapter.OPS,
    **lora_linear.OPS,
    **lora_row_norm.OPS,
    "dropout_mask": dropout_mask,
    **multi_lora_linear.OPS,
}
