"""Whether anybody wants to see which ops a call is made of."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd import forward_ad

_compiling = torch.compiler.is_compiling
_modes, _functions = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform, _trace = torch._C._functorch.maybe_current_level, torch._C._get_tracing_state
_profiler = torch.autograd._profiler_enabled


def nobody_watches() -> bool:
    """False for a compiler, a tracer, a mode, a transform, a profiler or a level of forward-mode AD."""
    return not (
        _compiling()
        or _modes()
        or _functions()
        or _transform() is not None
        or _trace() is not None
        or _profiler()
        or forward_ad._current_level >= 0
    )


def no_tangents(name: str, args: Iterable) -> None:
    """Raise NotImplementedError if one of an op's arguments, tensors and lists of them among others, has a tangent: torch
    would drop it without a word."""
    if forward_ad._current_level < 0:
        return
    for value in args:
        if isinstance(value, list):
            no_tangents(name, value)
        elif isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(f"{name} does not support forward-mode AD: pass it tensors without a tangent")
