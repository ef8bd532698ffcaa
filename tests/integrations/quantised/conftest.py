"""Tests against libraries that quantise weights: bitsandbytes, torchao, optimum-quanto, hqq and gguf.

They are collected in ``.venv-quantised`` alone (``make quantised-env``): tests/integrations/test_environments.py runs them there.
"""

from __future__ import annotations

import importlib.util
import runpy
import types
from unittest import mock

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("bitsandbytes") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def quanto_in_python():
    """quanto's definition in Python in place of the extension that it would compile at its first use, for a minute."""
    from optimum.quanto.library.extensions import cpp

    file = importlib.util.find_spec("optimum.quanto.library.unpack").origin
    with mock.patch("torch.library.define"), mock.patch("torch.library.impl", lambda *_: lambda function: function):
        theirs = types.SimpleNamespace(unpack=runpy.run_path(file)["unpack"])
    before, cpp.ext._lib = cpp.ext._lib, theirs
    yield
    cpp.ext._lib = before
