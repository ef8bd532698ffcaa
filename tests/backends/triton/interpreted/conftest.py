"""Tests of the Triton kernels in Triton's interpreter.

The interpreter is chosen when Triton is imported, for the whole process. So these files are collected only in a process
that was started with ``TRITON_INTERPRET=1``: ``tests/backends/triton/test_interpreter.py`` starts one for each.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
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
    core, semantic = interpreter.tl.core, interpreter.TritonSemantic
    patch, done = interpreter._patch_lang, set()

    @functools.cache
    def modules(fn) -> frozenset:
        return frozenset(id(value) for value in fn.__globals__.values() if inspect.ismodule(value))

    class Kept:
        def restore(self):
            """In this process nobody wants Triton's own functions back."""

    def patched(fn):
        # A launch puts the interpreter's functions in the place of Triton's; so does each call of a device function in it.
        if modules(fn) not in done:
            patch(fn)
            done.add(modules(fn))
        return Kept()

    # Every value of a block describes its shape anew: the same few shapes, a million times.
    make_block_type, block_types = core.block_type.__init__, {}

    def block_type(self, element_ty, shape):
        key = element_ty.name, *shape
        if key not in block_types:
            make_block_type(self, element_ty, shape)
            block_types[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = block_types[key]

    @functools.cache
    def constants(sizes: tuple[int, ...]):
        return core.tuple([core.constexpr(s) for s in sizes]), core.constexpr(math.prod(sizes))

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = constants((*type.shape.values,) if type.is_block() else ())

    broadcast = semantic.broadcast_impl_value

    def broadcast_impl_value(self, lhs, rhs):
        shapes = [v.type.shape.values if v.type.is_block() else None for v in (lhs, rhs)]
        return (lhs, rhs) if shapes[0] == shapes[1] else broadcast(self, lhs, rhs)

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
        change.setattr(core.block_type, "__init__", block_type)
        change.setattr(core.tensor, "__init__", tensor)
        change.setattr(semantic, "broadcast_impl_value", broadcast_impl_value)
        yield
