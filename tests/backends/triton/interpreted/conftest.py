"""Tests of the Triton kernels in Triton's interpreter.

The interpreter is chosen when Triton is imported, for the whole process. So these files are collected only in a process
that was started with ``TRITON_INTERPRET=1``: ``tests/backends/triton/test_interpreter.py`` starts one for each.
"""

from __future__ import annotations

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
