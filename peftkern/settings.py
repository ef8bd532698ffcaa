"""Every environment variable that peftkern reads at run time, in one place.

Values are read at each call, so a test or a program may change them between calls. A value outside the
listed ones raises ValueError and names the variable.
"""

from __future__ import annotations

import os

_FALSE = {"", "0", "false", "off", "no"}


def _choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default).strip().lower() or default
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
    return value


def backend() -> str:
    """``PEFTKERN_BACKEND``: ``auto`` (default) or the one back end that must take every call."""
    return _choice("PEFTKERN_BACKEND", "auto", ("auto", "reference", "cpu", "triton", "cuda"))


def cpu_base() -> str:
    """``PEFTKERN_CPU_BASE``: who computes the base product on CPU: ``auto``, ``vendor`` or ``panels``."""
    return _choice("PEFTKERN_CPU_BASE", "auto", ("auto", "vendor", "panels"))


def cpu_isa() -> str:
    """``PEFTKERN_CPU_ISA``: ``auto`` or the highest instruction set that the C++ kernels may use."""
    return _choice("PEFTKERN_CPU_ISA", "auto", ("auto", "plain", "avx2", "avx512"))


def batch_invariant() -> bool:
    """``PEFTKERN_BATCH_INVARIANT=1``: a row's bits do not depend on the rest of the batch, base product included."""
    return os.environ.get("PEFTKERN_BATCH_INVARIANT", "").strip().lower() not in _FALSE


def triton_interpret() -> bool:
    """``TRITON_INTERPRET=1``: Triton's own switch; its kernels then run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() not in _FALSE
