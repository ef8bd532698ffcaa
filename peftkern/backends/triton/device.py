"""What Triton's launchers must know of the device that a call is on."""

from __future__ import annotations

import contextlib

import torch

from ...problem import TritonWay


def kernel_settings(t: torch.Tensor, way: TritonWay):
    """The kernels' Settings for a call on the device of ``t``."""
    from ...kernels.call import Settings

    arch = 0
    if t.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(t.device)
        arch = major * 10 + minor
    return Settings(arch, torch.backends.cuda.matmul.allow_tf32, way.batch_invariant, way.fixed)


def on_device(t: torch.Tensor):
    """Triton starts kernels on the current device's current stream."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else contextlib.nullcontext()
