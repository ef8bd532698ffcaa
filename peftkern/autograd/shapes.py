"""What the differentiable functions do to arguments before an op and to results after it: rows, casts, shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..bases.base import kind_of

# Whether a tensor has escaped from a torch.func transform.
escaped = torch._C._functorch.is_functorch_wrapped_tensor


def unlooked(function: type[torch.autograd.Function]) -> Callable:
    """``function.apply`` without its look for tensors that have ``escaped``: a third of its time."""
    return super(torch.autograd.Function, function).apply


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` in ``dtype``, itself if it is."""
    return t if t.dtype == dtype else t.to(dtype)


def cast_base(kind: str, tensors: Iterable[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """A base's tensors as autocast to ``dtype`` casts them; as they are without autocast (None), or where there are none."""
    tensors = list(tensors)
    return tensors if dtype is None or not tensors else kind_of(kind).cast(tensors, dtype)


def rows_of(t: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., C), or a gradient of its rows, as (M, C) in ``dtype``."""
    if t.dim() == 0:
        raise ValueError("x has shape (), expected (..., K)")
    # Not -1: with no columns torch could not tell the number of rows.
    t = cast(t, dtype)
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def as_shape(y: Tensor, x: Tensor) -> Tensor:
    """y (M, N) with x's leading dimensions."""
    # Not a view for autograd: the output may be changed in place (nn.ReLU(inplace=True)), as F.linear's may.
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of F.linear's arguments (fp64 it leaves alone), None where it does nothing."""
    device = "cpu" if x.is_cpu else x.device.type
    if not (x.is_cpu or x.is_cuda or torch.amp.is_autocast_available(device)) or not torch.is_autocast_enabled(device):
        return None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(device)


def no_transforms(name: str) -> None:
    """Raise RuntimeError inside a torch.func transform."""
    if torch._C._functorch.maybe_current_level() is not None and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name} does not support torch.func transforms (grad, vmap, jvp); call it outside of them")


def uncast(t: Tensor) -> contextlib.AbstractContextManager:
    """A block in which what is made on t's device is not rounded by autocast."""
    device = t.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()
