"""AdapterHub's ``adapters``: its bottleneck adapters and what else runs on the fused ops, in place and reversibly.

Results equal the library's to rounding, its quirks included. Dropout masks differ from the library's, their law does not;
``torch.manual_seed`` makes them reproducible. Second derivatives, which the library's own code has, raise an error.
"""

from __future__ import annotations

from collections.abc import Callable

import adapters
from torch import nn

from ...methods.look import NotCovered
from ..library import Found, Library
from ..report import ROWS, computed_by
from ..tested import release_reason
from .composition import COMPOSITION
from .forward import NAME, install, plan_of, replaced_reason, switch
from .known import KINDS, left, owned

_TESTED = (1, 3)


class AdapterHub(Library):
    """The modules of ``adapters``."""

    name = NAME
    switch = switch

    def owns(self, module: nn.Module) -> bool:
        return owned(module)

    def type_reason(self, layer: nn.Module) -> str | None:
        return _version_reason() or left(layer) or replaced_reason(type(layer))

    def patch_reason(self) -> str | None:
        return _version_reason() or next(filter(None, map(replaced_reason, KINDS)), None)

    def looks(self) -> Callable[[nn.Module], Found | str]:
        return _found

    def install(self) -> None:
        with switch.lock:
            install()
            for (cls, name), make in COMPOSITION.items():
                switch.replace(cls, name, make)


LIBRARY = AdapterHub()


def _version_reason() -> str | None:
    return release_reason("adapters", adapters.__version__, _TESTED, _TESTED)


def _found(layer: nn.Module) -> Found | str:
    try:
        call = KINDS[type(layer)].call(plan_of(layer), ROWS)
    except NotCovered as reason:
        return str(reason)
    return call if isinstance(call, Found) else Found(computed_by(call), call.device)


def why_not(layer: nn.Module) -> str | None:
    """Why calls of this module would run AdapterHub's own code right now, or None. What depends on the arguments of a call is
    not judged."""
    reason = LIBRARY.type_reason(layer)
    if reason is None and not switch.wanted(layer):
        reason = "it is not accelerated: call accelerate or patch"
    if reason is not None:
        return reason
    try:
        plan_of(layer)
    except NotCovered as reason:
        return str(reason)
    return None
