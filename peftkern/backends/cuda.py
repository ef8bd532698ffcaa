"""CUDA C++ kernels (csrc/cuda) on CUDA tensors. Ops that are not listed here go to the next back end."""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from ..problem import Problem

NAME = "cuda"


@functools.cache
def unavailable() -> str | None:
    """Why no call can go here: no native build, one without CUDA, or no device."""
    try:
        native = importlib.import_module("peftkern._C")
    except ImportError as error:
        return f"the native module is not built ({error})"
    if not native.cuda_built:
        return "the native module was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def decline(problem: Problem) -> str | None:
    """Why this problem cannot be taken."""
    return None if problem.device == "cuda" else f"the tensors are on {problem.device}"


def _dropout_mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    from peftkern import _C

    out = torch.empty((M, K), dtype=torch.bool, device=seed.device)
    with torch.cuda.device(seed.device):
        stream = torch.cuda.current_stream().cuda_stream
        _C.cuda_dropout_mask(seed.data_ptr(), M, K, int(p * 2.0**32), out.data_ptr(), stream)
    return out


OPS = {"dropout_mask": _dropout_mask}
