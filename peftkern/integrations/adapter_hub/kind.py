"""What a file of this package says of a class of AdapterHub's modules: how its calls run fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ...dispatch.cpu_base import this_cpu, vendor_is_fast
from ...methods.look import PLAIN_TENSORS, Look, NotCovered
from ...problem import Problem
from ...settings import current
from ..library import Found
from ..status import NO_GAIN

_HALF = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Kind:
    """The modules of exactly this class.

    Attributes:
        cls: the library's class, whose ``forward`` is replaced.
        plan: a look at such a module -> what its calls compute in the state of now. Raises ``NotCovered``.
        run: (plan, the module, the arguments of the call) -> what ``forward`` returns. Raises ``NotCovered``, before it
            computes or draws anything, where the arguments speak against it.
        call: (plan, M) -> the call of a public function that it makes for M rows, for the report, or what to report.
        least: plan -> the elements of an input below which the library's own code is faster, on a CPU; 0 if it never is.
    """

    cls: type
    plan: Callable[[Look], Any]
    run: Callable[..., Any]
    call: Callable[[Any, int], Problem | Found]
    least: Callable[[Any], int] = lambda plan: 0


def check_gain(like: Tensor) -> None:
    """Refuse bottlenecks with parameters in a half precision whose products the vendor computes fast on this CPU: ours go
    through fp32.

    Raises:
        NotCovered: with the reason.
    """
    if like.dtype in _HALF and like.is_cpu:
        if is_dynamo_compiling():
            raise NotCovered("a graph does not ask which product is faster")
        now = current()
        asked = now.cpu_kind != "auto" or now.cpu_base == "panels" or now.batch_invariant
        if not asked and vendor_is_fast(like.dtype, this_cpu(now.cpu_isa, now.tables)):
            raise NotCovered(NO_GAIN)


def check_input(x: Any, like: Tensor) -> None:
    """Refuse an input that is no plain dense tensor beside this parameter. The library takes it, or raises its own error.

    Raises:
        NotCovered: with the reason.
    """
    if type(x) not in PLAIN_TENSORS or x.layout is not torch.strided or x.is_nested:
        raise NotCovered("the input is not a plain dense tensor")
    device = x.device
    if device.type not in ("cpu", "cuda"):
        raise NotCovered(f"device type {device.type} is not covered")
    if like.device != device:
        raise NotCovered("its parameters are on another device than the input")
    if torch.is_autocast_enabled(device.type):
        if x.dtype not in _FLOATS[:3] or like.dtype not in _FLOATS[:3]:
            raise NotCovered("a dtype that autocast does not cast")
    elif x.dtype != like.dtype or x.dtype not in _FLOATS:
        raise NotCovered(f"the input is {x.dtype}, its parameters are {like.dtype}")
