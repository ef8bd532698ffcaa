"""Every environment variable that peftkern reads at run time, in one place.

Values are read at each call, so a test or a program may change them between calls. A value outside the
listed ones raises ValueError and names the variable.
"""

from __future__ import annotations

import os
from typing import NamedTuple

_FALSE = {"", "0", "false", "off", "no"}


class Settings(NamedTuple):
    """The values of one moment."""

    # PEFTKERN_BACKEND: auto, or the one back end that must take every call.
    backend: str
    # PEFTKERN_CPU_BASE: who computes the base product on CPU.
    cpu_base: str
    # PEFTKERN_CPU_ISA: the highest instruction set that the C++ kernels may use.
    cpu_isa: str
    # PEFTKERN_BATCH_INVARIANT=1: a row's bits do not depend on the rest of the batch, base product included.
    batch_invariant: bool
    # PEFTKERN_SAVE_INPUT=copy: backward keeps a copy of a layer's input, so that it may be changed in place afterwards.
    save_input: str
    # TRITON_INTERPRET=1: Triton's own switch; its kernels then run on CPU tensors.
    triton_interpret: bool


# Allowed words, the default first; none for a switch.
_VARIABLES = {
    "PEFTKERN_BACKEND": ("auto", "reference", "cpu", "triton", "cuda"),
    "PEFTKERN_CPU_BASE": ("auto", "vendor", "panels"),
    "PEFTKERN_CPU_ISA": ("auto", "plain", "avx2", "avx512"),
    "PEFTKERN_BATCH_INVARIANT": (),
    "PEFTKERN_SAVE_INPUT": ("shared", "copy"),
    "TRITON_INTERPRET": (),
}


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
_last: tuple[tuple, Settings] | None = None


def current() -> Settings:
    """The settings of now.

    Raises ValueError for a word that a variable does not know.
    """
    global _last
    last, words = _last, tuple(map(_read, _keys))
    if last is None or last[0] != words:
        last = _last = words, Settings(*(_parse(name, allowed) for name, allowed in _VARIABLES.items()))
    return last[1]


_SAVE_INPUT = _keys[list(_VARIABLES).index("PEFTKERN_SAVE_INPUT")]


def copies_input() -> bool:
    """``current().save_input == "copy"``, for a fifth of its time where the variable is not set."""
    return _read(_SAVE_INPUT) is not None and current().save_input == "copy"
