"""What holds for all layers of the process when one is called: hooks, replaced forwards, tracers, transforms.

Nothing here depends on grad mode: reentrant checkpointing runs the forward once without and once with it, and both runs
must take the same path (else they draw different dropout bits).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _nn_module
from transformers.pytorch_utils import Conv1D

from ..methods.unchanged import EMPTY, at, call, equal, instance, items, same

# Classes whose calls are left out, and their forwards.
_BYPASSED = {cls: cls.forward for cls in (nn.Linear, Conv1D, nn.Dropout)}
_GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip
_TRACES = torch._C._TorchDispatchModeKey.PROXY  # the mode of make_fx, whose graph would have ops without a gradient


def process_reason() -> str | None:
    """Why no layer of the process may be taken right now, or None."""
    m = _nn_module
    if m._global_forward_hooks or m._global_forward_pre_hooks:
        return "a global module hook is registered"
    if m._global_backward_hooks or m._global_backward_pre_hooks:
        return "a global module hook is registered"
    for cls, forward in _BYPASSED.items():
        if cls.forward is not forward:
            return f"the forward of {cls.__module__}.{cls.__qualname__} was replaced"
    if torch.compiler.is_compiling():
        # An exported program should run where peftkern is not installed.
        return "torch.export is tracing" if torch.compiler.is_exporting() else None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    if torch._C._get_dispatch_mode(_TRACES) is not None:
        return "make_fx is tracing"
    if torch._C._functorch.maybe_current_level() is not None:
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None


# What process_reason looks at, outside of a graph. While torch.jit traces, no input looks as before: its sizes are tensors.
PROCESS = (
    at(vars(_nn_module), items(dict.fromkeys(_GLOBAL_HOOKS, EMPTY))),
    *(at(cls, instance(type, {}, {"forward": same(forward)})) for cls, forward in _BYPASSED.items()),
    at(vars(torch.compiler), items({"_is_compiling_flag": same(False)})),
    call(torch._C._get_dispatch_mode, (_TRACES,), same(None)),
    call(torch._C._functorch.maybe_current_level, (), same(None)),
    at(vars(forward_ad), items({"_current_level": equal(-1)})),
)
