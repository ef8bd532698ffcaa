"""Tests that need a CUDA device. Without one every test here is skipped, and says so."""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path

import pytest
import torch

# Before the first product: torch asks for it where deterministic algorithms are wanted (tests/conftest.py).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

BACKENDS = ("reference", "cuda", "triton")
# A kernel that never ends can't be interrupted: the process ends instead, with a traceback. Under pytest-xdist that fails
# one test, and another process goes on with the rest.
SECONDS, SANITIZER_SECONDS = 80, 165


@pytest.hookimpl(tryfirst=True)  # tests/conftest.py goes by the mark
def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(skip)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The back end that takes what it can (see ``using``)."""
    from calls import using

    with using(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def an_end(request):
    """A limit for every test."""
    seconds = SANITIZER_SECONDS if "sanitizer" in request.node.name else SECONDS
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def no_stale_memory():
    """Tests do not inherit each other's cached blocks, so that a read past an end meets no old values."""
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
