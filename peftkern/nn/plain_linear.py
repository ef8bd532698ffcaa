"""Which ``nn.Linear`` a LoRALinear can be made from: one that is its weight and its bias, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import FLOATING

_FORWARD = nn.Linear.forward
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _name(thing) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def tensor_reason(t: Tensor) -> str | None:
    """Why nothing can be added to this weight or bias, or None. Exact: what a subclass does then is its own affair."""
    if type(t) is not nn.Parameter and type(t) is not Tensor:
        return f"is a {_name(type(t))}, not a plain tensor"
    if t.layout is not torch.strided or t.dtype not in FLOATING:
        return f"is a {t.layout} tensor of {t.dtype}, expected a dense one of fp32, bf16, fp16 or fp64"
    return None


def linear_reason(linear: nn.Linear) -> str | None:
    """Why this layer may compute something else than x W^T + bias, or cannot lend its weight, or None."""
    if "parametrizations" in linear._modules:
        names = ", ".join(linear._modules["parametrizations"])
        return f"has a parametrization of {names}: torch.nn.utils.parametrize.remove_parametrizations makes it plain"
    if type(linear) is not nn.Linear:
        return f"is a {_name(type(linear))}, whose forward may be another one; expected torch.nn.Linear itself"
    if "forward" in linear.__dict__ or nn.Linear.forward is not _FORWARD:
        return f"has a forward that was replaced by {_name(linear.forward)}"
    for kind in _HOOKS:
        for hook in getattr(linear, kind).values():
            return f"carries a hook, {_name(hook)} in {kind}"
    if more := sorted({*linear._parameters, *linear._buffers, *linear._modules} - {"weight", "bias"}):
        return f"holds more than weight and bias: {', '.join(more)}"
    for name in ("weight", "bias"):
        t = getattr(linear, name)
        reason = None if t is None else tensor_reason(t)
        if reason is not None:
            return f"has a {name} that {reason}"
        if t is not None and (t is not linear._parameters.get(name) or not t.is_leaf):
            return f"has a {name} that is no parameter of its own (FSDP makes views of them): convert it before"
    if linear.bias is not None and linear.bias.dtype not in (linear.weight.dtype, torch.float32):
        return f"has a bias of {linear.bias.dtype}, expected {linear.weight.dtype} like the weight"
    return None
