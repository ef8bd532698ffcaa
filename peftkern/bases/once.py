"""What is made of a library's scales, made once for as long as they stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

P, T = ParamSpec("P"), TypeVar("T")


def once(make: Callable[P, T]) -> Callable[P, T]:
    """``make`` of tensors, which remembers its result while the first of them lives.

    Another tensor, a write to one of them in place or other memory behind it (``.data = ...``) is seen, and makes it anew.
    What ``torch.compile`` traces, or tensors of inference mode, which have no version, is made at each call.
    """
    kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @wraps(make)
    def found(*tensors: Tensor):
        if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
            return make(*tensors)
        first, *others = tensors
        state = [(t._version, t.data_ptr()) for t in tensors]
        last = kept.get(first)
        # The others are kept as well, so that none of them can have the address of one that is gone.
        if last is None or last[0] != state or any(a is not b for a, b in zip(last[1], others, strict=True)):
            last = kept[first] = state, others, make(*tensors)
        return last[2]

    return found
