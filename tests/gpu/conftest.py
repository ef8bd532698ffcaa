"""Tests that need a CUDA device. Without one every test here is skipped, and says so."""

from __future__ import annotations

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
def no_stale_memory():
    """Tests do not inherit each other's cached blocks, so that a read past an end meets no old values."""
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
