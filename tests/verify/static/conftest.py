"""Compiled kernels are kept in this checkout, one folder for each state of its kernels."""

import importlib.util

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache():
    """TRITON_CACHE_DIR below build/, for the tests of this folder."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from peftkern.verify.static import triton

    with triton.own_cache():
        yield
