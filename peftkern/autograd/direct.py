"""Straight to the CPU back end, where nothing could see the difference.

torch.library's dispatcher, the checks of an op and the choice of a back end take as long as the kernels of a few rows
(0.2 ms against 0.3 once a layer's weights have passed through the caches). A call that the differentiable function has
checked itself, on plain CPU tensors, with nobody listening, needs none of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from .. import dispatch, settings
from ..adapter_table import plain

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def direct(name: str, dtype: torch.dtype, *tensors: Tensor | None) -> Callable | None:
    """The CPU back end's function for the op ``name`` and an x of ``dtype``, or None: ``torch.ops`` must be called.

    The caller vouches that shapes and dtypes of the ``tensors`` fit, and that no gradient is required.
    """
    if dtype not in _DTYPES or not plain(*tensors) or _watched():
        return None
    if settings.current().backend not in ("auto", "cpu"):
        return None
    cpu = dispatch.load("cpu")
    return None if cpu.unavailable() else cpu.OPS[name]


def _watched() -> bool:
    # Compilers, tracers, modes, profilers and the log want to see the op; autocast is switched off in the dispatcher.
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or torch.is_autocast_enabled("cpu")
        or dispatch.log.isEnabledFor(logging.DEBUG)
    )
