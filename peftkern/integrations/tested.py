"""Whether a library is as the tests know it: its release, and the functions of its classes."""

from __future__ import annotations

from collections.abc import Callable

from packaging.version import InvalidVersion, Version

Release = tuple[int, int]


def release_reason(library: str, version: str, low: Release, high: Release) -> str | None:
    """Why this version of a library is not one between these (major, minor), or None."""
    try:
        release = Version(version).release
    except InvalidVersion:
        release = ()
    if low <= release[:2] <= high:
        return None
    low, high = (".".join(map(str, r)) for r in (low, high))
    return f"{library} {version} is outside the tested range {low} to {high}"


def replaced_by(cls: type, ours: Callable | None) -> str | None:
    """The name of what another library has put in the place of the class's own ``forward``, or None. ``ours``: what we
    have put there."""
    current = cls.forward
    if current is ours:
        return None
    module, name = getattr(current, "__module__", "?"), getattr(current, "__qualname__", "?")
    owner = next(c for c in cls.__mro__ if "forward" in vars(c))  # some classes have that of their parent
    if (module, name) == (owner.__module__, f"{owner.__qualname__}.forward") and not hasattr(current, "__wrapped__"):
        return None
    return f"{module}.{name}"
