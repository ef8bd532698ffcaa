"""What Triton's launchers must know of the device that a call is on."""

from __future__ import annotations

import contextlib

import torch

from ... import settings
from ...dispatch import tuned


def kernel_settings(t: torch.Tensor, measured: tuned.Entry | None = None):
    """The kernels' Settings for a call on the device of ``t``."""
    from ...kernels.call import Settings
    from ...kernels.configs import BASES, LaunchConfig

    arch = 0
    if t.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(t.device)
        arch = major * 10 + minor
    base = gemm = None
    if measured is not None and measured.candidate in BASES:
        base, gemm = measured.candidate, measured.config and LaunchConfig(**measured.config)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return Settings(arch, tf32, settings.current().batch_invariant, base, gemm)


def on_device(t: torch.Tensor):
    """Triton starts kernels on the current device's current stream."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else contextlib.nullcontext()
