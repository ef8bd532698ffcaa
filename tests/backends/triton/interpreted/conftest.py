"""Tests of the Triton kernels in Triton's interpreter.

The interpreter is chosen when Triton is imported, for the whole process. So these files are collected only in a process
that was started with ``TRITON_INTERPRET=1``: ``tests/backends/triton/test_interpreter.py`` starts one for each.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import warnings

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    """Every op goes to the Triton back end or fails."""
    monkeypatch.setenv("PEFTKERN_BACKEND", "triton")
    with warnings.catch_warnings():
        # NaN and infinity pass through NumPy here, as they should.
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture(scope="session", autouse=True)
def without_idle_work():
    """The interpreter at twice the speed: what it does again and again, or for nothing, it does once, or not at all."""
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.9."):  # what is replaced below is private, and differs in other releases
        yield
        return
    patch, done = interpreter._patch_lang, set()

    @functools.cache
    def modules(fn) -> frozenset:
        return frozenset(id(value) for value in fn.__globals__.values() if inspect.ismodule(value))

    class Launch:
        def __init__(self, scope):
            self.scope = scope

        def restore(self):
            done.clear()
            self.scope.restore()

    def patched(fn):
        # A launch puts the interpreter's functions in the place of Triton's; so does each call of a device function in it.
        if modules(fn) in done:
            return None  # which only a launch looks at, and those are not nested
        scope = patch(fn) if done else Launch(patch(fn))
        done.add(modules(fn))
        return scope

    numpy_dtype, of_scalar = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)

    def dtype_of(kind):
        return numpy_dtype(kind) if kind.scalar.is_ptr() else of_scalar(kind.scalar)

    # Every sum of integers is made a second time in 64 bits, and compared, for an assertion that only ``debug`` makes.
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    assert not options.debug
    with pytest.MonkeyPatch.context() as change:
        change.setattr(interpreter, "_patch_lang", patched)
        change.setattr(interpreter, "_get_np_dtype", dtype_of)
        change.setattr(interpreter.interpreter_builder, "options", options)
        yield
