"""Compiled kernels are kept in this checkout, one folder for each state of its kernels.

Triton's own cache, which all checkouts of a user share, asks neither where a kernel's source lies nor on which lines the
functions stand that it calls. These tests read both in what was compiled.
"""

import hashlib
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def own_cache():
    """TRITON_CACHE_DIR below build/, for the tests of this folder."""
    state = hashlib.sha256()
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        state.update(file.read_bytes())
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton" / state.hexdigest()[:16])
    yield
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before
