"""Whether objects still look as they did: dictionaries, types and attributes against a pattern, in one native call.

A pattern is a tuple that begins with its kind. It holds no module and no tensor, so it keeps nothing alive and cannot go
stale: what is compared is what the objects hold at that moment.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

try:
    from .._C import Unchanged
except ImportError:
    Unchanged = None  # the check in Python costs more than a careful look: nothing is worth keeping

Pattern = tuple
_MISSING = object()

EMPTY: Pattern = ("empty",)  # an empty dict or list
ABSENT: Pattern = ("absent",)  # of a dict: the key is missing


def same(value: Any) -> Pattern:
    """The very object."""
    return "same", value


def equal(value: Any) -> Pattern:
    """An object of this type and value. A list is copied: the pattern has its contents of now."""
    return "equal", list(value) if type(value) is list else value


def last(value: Any) -> Pattern:
    """A tuple whose last item is this value."""
    return "last", value


def items(fields: dict[str, Pattern]) -> Pattern:
    """A dict with these items, among others."""
    return "items", fields


def instance(cls: type, fields: dict[str, Pattern], attributes: dict[str, Pattern]) -> Pattern:
    """An instance of exactly this class: ``fields`` of its ``__dict__``, ``attributes`` as getattr finds them."""
    return "object", cls, fields, attributes


def keep(slot: int, pattern: Pattern) -> Pattern:
    """An object that the answer has at this place."""
    return "keep", slot, pattern


def at(other: Any, pattern: Pattern) -> Pattern:
    """Another object, which the pattern holds, looks like this."""
    return "at", other, pattern


def call(function: Any, arguments: tuple, pattern: Pattern) -> Pattern:
    """What the function says looks like this."""
    return "call", function, arguments, pattern


def _equal(now: Any, then: Any) -> bool:
    return now is then or (type(now) is type(then) and bool(now == then))


def _fields(fields: dict[str, Pattern], of: dict, kept: dict[int, Any]) -> bool:
    return all(_matches(part, of.get(key, _MISSING), kept) for key, part in fields.items())


def _matches(pattern: Pattern, now: Any, kept: dict[int, Any]) -> bool:
    kind, *parts = pattern
    if kind == "absent" or now is _MISSING:
        return kind == "absent" and now is _MISSING
    if kind == "same":
        return now is parts[0]
    if kind == "equal":
        return _equal(now, parts[0])
    if kind == "empty":
        return len(now) == 0
    if kind == "last":
        return isinstance(now, tuple) and len(now) > 0 and _equal(now[-1], parts[0])
    if kind == "items":
        return isinstance(now, dict) and _fields(parts[0], now, kept)
    if kind == "object":
        cls, fields, attributes = parts
        return (
            type(now) is cls
            and (not fields or _fields(fields, now.__dict__, kept))
            and all(_matches(part, getattr(now, name), kept) for name, part in attributes.items())
        )
    if kind == "keep":
        slot, part = parts
        kept[slot] = now
        return _matches(part, now, kept)
    if kind == "at":
        return _matches(parts[1], parts[0], kept)
    if kind == "call":
        function, arguments, part = parts
        return _matches(part, function(*arguments), kept)
    raise TypeError(f"a pattern of unknown kind: {kind}")


class PythonUnchanged:
    """``Unchanged`` in Python: the definition, which tests hold the native check to."""

    def __init__(self, *patterns: Pattern):
        self._patterns = patterns

    def match(self, *objects: Any) -> tuple | None:
        """The objects that the patterns keep, or None if anything differs.

        The first patterns are of these objects; those without one look at objects of their own (``at``, ``call``).
        """
        if len(objects) > len(self._patterns):
            raise TypeError(f"match takes at most {len(self._patterns)} objects, got {len(objects)}")
        kept: dict[int, Any] = {}
        try:
            if not all(_matches(*pair, kept) for pair in zip_longest(self._patterns, objects)):
                return None
        except (AttributeError, RuntimeError, TypeError):
            # What cannot be looked at is not as it was: who looks with care will say why.
            return None
        return tuple(kept.get(slot) for slot in range(len(kept)))
