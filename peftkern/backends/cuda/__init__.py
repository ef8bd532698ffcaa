"""CUDA C++ kernels (csrc/cuda) on CUDA tensors. Ops that are not listed here go to the next back end.

Which calls come here is decided in peftkern/dispatch/choose.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem import Problem
from ...settings import Settings
from . import bottleneck_adapter as cuda_bottleneck
from . import lora_linear as cuda_lora
from . import multi_lora_linear as cuda_multi
from . import native

NAME = "cuda"
BASES = ("dense", *sorted(cuda_lora.CODED))  # that its kernels read


def unavailable(now: Settings) -> str | None:
    """Why no call can go here: no native build, one without CUDA, no device, or one that is too old."""
    if native._C is None:
        return "the native module is not built"
    if not native._C.cuda_built:
        return "the native module was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the CUDA device is older than sm_80"
    return None


def decline(problem: Problem, now: Settings) -> str | None:
    """Why this problem cannot be taken."""
    if problem.device != "cuda":
        return f"the tensors are on {problem.device}"
    if problem.op == "dropout_mask":
        return None
    for kind in problem.flags & cuda_lora.CODED if problem.op != "lora_linear_fwd" else ():
        return f"reads a base of kind {kind} in the forward pass of lora_linear alone"
    for part in (cuda_multi, cuda_bottleneck):
        if problem.op in part.OPS:
            return part.decline(problem, now)
    return cuda_lora.decline(problem, now)


def _dropout_mask(c) -> Tensor:
    seed, M, K, p = c
    out = torch.empty((M, K), dtype=torch.bool, device=seed.device)
    with native.on_device(seed):
        native._C.cuda_dropout_mask(seed.data_ptr(), M, K, int(p * 2.0**32), out.data_ptr(), native.stream(seed))
    return out


OPS = {"dropout_mask": _dropout_mask, **cuda_lora.OPS, **cuda_multi.OPS, **cuda_bottleneck.OPS}
