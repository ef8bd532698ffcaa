"""Everything that steers who computes a call, as one value: the environment's words, and what tests and tuners change.

``current()`` is asked once per call, at the top; what it returned is passed down and is part of every key under which a
decision is kept. So nothing needs to be forgotten after a change. A word that a variable does not know raises ValueError
and names the variable.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# What may be measured as fastest on a GPU: who computes the base product (BASES of kernels/tl/configs.py), for ops
# without one Triton as such, the CUDA kernels, and plain torch.
CANDIDATES = ("addmm", "epilogue", "overlap", "fused", "triton", "cuda", "reference")

# Where measured tables are: those of the package, and a user's own, which ``peftkern tune`` writes. The variable
# PEFTKERN_TABLES names another folder for these; it is read once, so that a process never changes its mind.
TABLES = str(Path(__file__).parent / "tuned")
_CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
OWN_TABLES = os.path.expanduser(os.environ.get("PEFTKERN_TABLES") or os.path.join(_CACHE, "peftkern"))


class Settings(NamedTuple):
    """The values of one moment; the first six are environment variables, the others are changed by ``using`` alone."""

    # PEFTKERN_BACKEND: auto, or the one back end that must take every call.
    backend: str = "auto"
    # PEFTKERN_CPU_BASE: who computes the base product on CPU.
    cpu_base: str = "auto"
    # PEFTKERN_CPU_ISA: the highest instruction set that the C++ kernels may use.
    cpu_isa: str = "auto"
    # PEFTKERN_BATCH_INVARIANT=1: a row's bits do not depend on the rest of the batch, base product included.
    batch_invariant: bool = False
    # PEFTKERN_SAVE_INPUT=copy: backward keeps a copy of a layer's input, so that it may be changed in place afterwards.
    save_input: str = "shared"
    # TRITON_INTERPRET=1: Triton's own switch; its kernels then run on CPU tensors.
    triton_interpret: bool = False
    # The kind of base product on CPU where it can take the call at all (dispatch/cpu_base.py).
    cpu_kind: str = "auto"
    # What counts as fastest on a GPU: what was measured, none (as if nothing had been), or this one of CANDIDATES.
    candidate: str = "measured"
    # Folders of the measured tables, of CPUs and GPUs; the first that has one for a device is asked.
    tables: tuple[str, ...] = (OWN_TABLES, TABLES)
    # Name of the GPU whose table counts; empty: of the current device.
    gpu: str = ""
    # Answers that replace those of kernels/tl/configs.py: what its function ``fixed`` returns.
    triton_fixed: tuple[tuple[str, object], ...] = ()
    # (name, work): limits of small calls that replace those of the tables (dispatch/least.py).
    least: tuple[tuple[str, int], ...] = ()
    # Whether calls are taken that are too small to gain (dispatch/least.py).
    small_calls: bool = False


# Allowed words of the variables, the default first; none for a switch.
_VARIABLES = {
    "PEFTKERN_BACKEND": ("auto", "reference", "cpu", "triton", "cuda"),
    "PEFTKERN_CPU_BASE": ("auto", "vendor", "panels"),
    "PEFTKERN_CPU_ISA": ("auto", "plain", "avx2", "avx512"),
    "PEFTKERN_BATCH_INVARIANT": (),
    "PEFTKERN_SAVE_INPUT": ("shared", "copy"),
    "TRITON_INTERPRET": (),
}
# Allowed words of the fields that have some.
_WORDS = {
    **{field: words for field, words in zip(Settings._fields, _VARIABLES.values()) if words},
    "cpu_kind": ("auto", "vendor", "few", "panels", "bf16", "amx"),
    "candidate": ("measured", "none", *CANDIDATES),
}
_FALSE = {"", "0", "false", "off", "no"}


def _parse(name: str, allowed: tuple[str, ...]) -> str | bool:
    value = os.environ.get(name, "").strip().lower()
    if not allowed:
        return value not in _FALSE
    value = value or allowed[0]
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
    return value


# os.environ raises and catches two exceptions for each variable that is not set, at every call of every op. Its dict
# is asked instead where there is one, and words are looked at only when they have changed.
_read = getattr(os.environ, "_data", os.environ).get
_keys = tuple(map(getattr(os.environ, "encodekey", str), _VARIABLES))
# What ``using`` changes, the last one first in force; replaced as a whole, so that its identity tells of a change.
_changes: tuple[dict, ...] = ()
_lock = threading.Lock()
# The words and changes that were seen last, and what they mean.
_last: tuple[tuple, tuple, Settings] | None = None
_known: dict[Settings, Settings] = {}
_followers: list[Callable[[Settings], None]] = []


def current() -> Settings:
    """The settings of now. Equal ones are one object, so that what is kept under them may be found by identity.

    Raises ValueError for a word that a variable does not know.
    """
    global _last
    last, changes, words = _last, _changes, tuple(map(_read, _keys))
    if last is None or last[1] is not changes or last[0] != words:
        now = Settings(*(_parse(name, allowed) for name, allowed in _VARIABLES.items()))
        for change in changes:
            now = now._replace(**change)
        now = _known.setdefault(now, now)
        for follower in _followers:
            follower(now)
        last = _last = words, changes, now
    return last[2]


def follow(follower: Callable[[Settings], None]) -> None:
    """Call ``follower`` with the settings of now and after every change: for what C++ has once per process."""
    now = current()
    _followers.append(follower)
    follower(now)


@contextlib.contextmanager
def using(**values: object) -> Iterator[None]:
    """Change fields of the settings inside, for tests and tuners; of several that overlap the last one entered counts.

    Process-wide: a backward pass may run on another thread. Raises ValueError for a field or a word that there is not.
    """
    global _changes
    unknown = sorted(set(values) - set(Settings._fields))
    if unknown:
        raise ValueError(f"no setting is called {', '.join(unknown)}; there are {', '.join(Settings._fields)}")
    for name, allowed in _WORDS.items():
        if values.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{name} is {values[name]!r}, expected one of {', '.join(allowed)}")
    with _lock:
        _changes = (*_changes, values)
    try:
        yield
    finally:
        with _lock:
            _changes = tuple(change for change in _changes if change is not values)
