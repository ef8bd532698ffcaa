"""The forward of AdapterHub's modules on the fused ops, and what puts it in place.

The ``forward`` of each class is replaced by one that runs the library's own unless the instance is marked (``accelerate``) or
all are wanted (``patch``). Each call looks at the module anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ...methods.look import Look, NotCovered, Record, read
from ...settings import current
from ..process import process_reason
from ..status import KEY as CALLS
from ..status import TOO_SMALL, Calls, calls_of, note_stock
from ..switch import Switch
from ..tested import replaced_by
from .kind import Kind
from .known import KINDS

NAME = "AdapterHub"
switch = Switch()


def replaced_reason(cls: type) -> str | None:
    """Why the forward of this class is not ours to replace (another library did), or None."""
    _, ours = switch.replaced.get((cls, "forward"), (None, None))
    other = replaced_by(cls, ours)
    return None if other is None else f"{NAME}'s {cls.__qualname__}.forward was replaced by {other}"


def plan_of(module: nn.Module) -> Any:
    """What the calls of this module compute as it is now. Raises NotCovered with the reason why the library's own code
    runs."""
    reason = process_reason()
    if reason is not None:
        raise NotCovered(reason)
    # Whoever listens to a module, or has replaced its forward, reads what the library's own puts out.
    look = Look(module, Record(read, lambda *_: True))
    look.require(type(module), "the adapter")
    return KINDS[type(module)].plan(look)


def too_small(least: int, x: Any = None) -> bool:
    """Whether the library's own code is faster for an input x, and no setting asks for ours. ``least``: as in ``Kind``."""
    if not least or not isinstance(x, Tensor) or x.numel() >= least or not x.is_cpu:
        return False
    settings = current()
    return not (settings.small_calls or settings.batch_invariant)


def _fused(kind: Kind, own: Callable | None) -> Callable:
    stock = kind.cls.forward if own is None else own  # some classes have that of their parent

    def carefully(layer: nn.Module, calls: Calls | None, args: tuple, kwargs: dict) -> Any:
        plan = plan_of(layer)
        if calls is not None:
            calls.least = kind.least(plan)
            if too_small(calls.least, *args[:1]):
                raise NotCovered(TOO_SMALL)
        return kind.run(plan, layer, *args, **kwargs)

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        # A graph that counted would be compiled anew at each call.
        calls = None if is_dynamo_compiling() else self.__dict__.get(CALLS)
        # Too small: the library's own code is right whatever the module looks like by now.
        if calls is not None and too_small(calls.least, *args[:1]):
            calls.stock += 1
            calls.reason = TOO_SMALL
            return stock(self, *args, **kwargs)
        if type(self) is not kind.cls or not switch.wanted(self):
            return stock(self, *args, **kwargs)
        calls = None if is_dynamo_compiling() else calls_of(self)
        try:
            result = carefully(self, calls, args, kwargs)
        except NotCovered as reason:
            if calls is not None:
                note_stock(self, str(reason), NAME)
            return stock(self, *args, **kwargs)
        if calls is not None:
            calls.fused += 1
        return result

    return forward


def install() -> None:
    """Put the switching functions into the library's classes. Idempotent."""
    with switch.lock:
        for cls, kind in KINDS.items():
            if replaced_reason(cls) is None:
                switch.replace(cls, "forward", functools.partial(_fused, kind))
