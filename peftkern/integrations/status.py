"""What ran: calls of accelerated layers, fused and in the library's own code, and a warning where a report said otherwise.

Counting must cost a small layer nothing: a fused call adds one to an integer, everything else happens where the library's own
code runs. Between reading and storing an attribute CPython (with its lock) switches no thread, so no call is lost.
"""

from __future__ import annotations

import re
import threading
import warnings
from typing import Any

from torch import nn

KEY = "_peftkern_calls"

_lock = threading.Lock()

# What the user asked for: then the base layer alone is the whole of the library's forward, and nothing is lost.
_ASKED_FOR = ("its adapters are disabled", "its adapters are merged", "it has no")
TOO_SMALL = "too small to gain: the library's own code is faster"
NO_GAIN = "nothing to gain: the vendor's product is faster"


class Calls:
    """Calls of one layer since the last reset. ``reason``: why the last of those that ran the library's own code did.

    ``warned``: None, or, if a report said that the layer is accelerated, what its layers have warned of already.
    ``least``: the elements of an input below which it does, since it is faster then (dispatch/least.py); 0 if it never is.
    ``kept``: the plan of its last fused call (``kept.Kept``), which copies and pickles of the layer do not get.
    """

    __slots__ = ("fused", "kept", "least", "reason", "stock", "warned")

    def __init__(self, warned: set[tuple[str, str]] | None = None) -> None:
        self.warned = warned
        self.kept: Any = None
        self.least = 0
        self.reset()

    def reset(self) -> None:
        self.fused, self.stock, self.reason = 0, 0, None

    def __deepcopy__(self, memo) -> Calls:
        # A copy of a layer starts at zero, and is under the same report.
        return Calls(self.warned)

    def __reduce__(self):
        # None: the pickle of an accelerated model loads where only PEFT is installed.
        return type(None), ()


def known_calls(layer: nn.Module) -> Calls | None:
    """The counters of this layer if it has been accelerated, else None."""
    return layer.__dict__.get(KEY)


def calls_of(layer: nn.Module) -> Calls:
    """The counters of this layer, made at first use."""
    calls = layer.__dict__.get(KEY)
    if calls is None:
        with _lock:
            calls = layer.__dict__.get(KEY)
            if calls is None:
                calls = layer.__dict__[KEY] = Calls()
    return calls


def clear_calls(layer: nn.Module) -> None:
    """Forget the counters of this layer."""
    layer.__dict__.pop(KEY, None)


def _kind(layer: nn.Module) -> str:
    base = layer._modules.get("base_layer")
    cls = type(layer if base is None else base)
    return f"{'a layer of type' if base is None else 'a LoRA layer on'} {cls.__module__}.{cls.__qualname__}"


def note_stock(layer: nn.Module, reason: str, library: str = "PEFT") -> None:
    """Count a call that runs the library's own code; warn if the report said otherwise, once for each kind of layer and
    reason."""
    calls = calls_of(layer)
    calls.stock += 1
    calls.reason = reason
    if calls.warned is None or reason in (TOO_SMALL, NO_GAIN) or reason.startswith(_ASKED_FOR):
        return
    # A reason that differs in names or sizes alone is the same one.
    key = _kind(layer), re.sub(r"'[^']*'|\d+", "", reason)
    if key not in calls.warned:
        calls.warned.add(key)
        warnings.warn(
            f"peftkern: {key[0]} was reported as accelerated, but runs {library}'s own code: {reason}."
            " peftkern.status(model) counts such calls and names their layers.",
            RuntimeWarning,
            stacklevel=2,
        )
