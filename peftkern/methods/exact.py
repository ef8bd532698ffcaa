"""What methods that change the weight have in common: matrices made in fp32, whatever autocast says, and at listed places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..autograd.shapes import cast, uncast
from ..checks import accumulate_dtype
from .look import PLAIN_TENSORS, Look, NotCovered


def wide(t: Tensor) -> Tensor:
    """A tensor in fp32 (fp64 for fp64)."""
    return cast(t, accumulate_dtype(t.dtype))


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32 (fp64), under autocast too."""
    with uncast(left):
        return wide(left) @ wide(right)


def refuse_half(name: str, *tensors: Tensor) -> None:
    """Decline an adapter in half precision: a folded weight is in fp32, whose product may cost more than the library's two."""
    if any(t.dtype.itemsize < 4 for t in tensors):
        raise NotCovered(f"adapter {name!r} is in half precision, and its weight would be folded in fp32")


def places(look: Look, held_by: str, name: str, values: Tensor) -> Tensor:
    """Rows and columns (2, n) of an adapter's n numbers, which the layer has in a dict of tensors."""
    found = look.item(held_by, name)
    if type(found) not in PLAIN_TENSORS or found.shape != (2, values.numel()):
        raise NotCovered(f"{held_by} of {name!r} do not fit its numbers")
    return found.to(values.device)


_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def made_of(constant: Tensor, make: Callable[..., Any], *args: Any) -> Any:
    """``make(constant, *args)``, no view of it, kept for as long as the tensor lives and does not change."""
    if torch.compiler.is_compiling() or constant.is_inference():
        return make(constant, *args)
    key, found = (make, args, constant._version, constant.data_ptr()), _made.get(constant)
    if found is None or found[0] != key:
        found = _made[constant] = key, make(constant, *args)
    return found[1]
