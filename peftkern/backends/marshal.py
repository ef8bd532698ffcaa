"""Tensors as the C++ extension takes them: dtype codes, plain copies of what is no plain tensor."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def set_up(module: ModuleType, product, *, exports: bool = True) -> str | None:
    """Bring the native entries of ``module`` to this torch; None, or why there are none.

    ``product``: computes a base product where torch's libraries export none. ``exports=False``: without the functions that
    torch's libraries export, memory and products come through Python.
    """
    try:
        module.tensors_set_up(
            torch.Tensor, torch.nn.Parameter, torch._C.TensorBase.is_neg, torch.empty, tuple(CODES), product,
            torch._C.__file__ if exports else None,
        )  # fmt: skip
    except (AttributeError, RuntimeError, ValueError) as error:
        return f"torch {torch.__version__} has no usable exchange API: {error}"
    return None


def copied(value):
    """A tensor as an ordinary one of its own, likewise those of a tuple; anything else as it is."""
    if isinstance(value, Tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return value.detach().as_subclass(Tensor).resolve_neg().clone(memory_format=torch.contiguous_format)
    return tuple(map(copied, value)) if type(value) is tuple else value


def memory(w: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie: offsets of a table count these."""
    w = w.resolve_neg()
    return w if w.is_contiguous() else w.as_strided((w.numel(),), (1,))
