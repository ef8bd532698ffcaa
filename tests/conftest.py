"""Conditions that hold for every test: fixed seeds, at most two threads in all, uninitialised memory shown as NaN."""

from __future__ import annotations

import collections
import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Whose product computes a layer is the package's tables' to say, not that of whoever tuned this machine.
os.environ["PEFTKERN_TABLES"] = os.devnull
# Before torch starts OpenMP: an idle thread sleeps. Where other processes share the cores, spinning costs minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

from peftkern import settings

# Under pytest-xdist each worker gets one thread: two workers on two cores.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2


# Making a BOFT layer of PEFT leaves CC and CXX at gcc, which links no C++ (findings/peft_boft_leaves_cc_and_cxx.sh).
COMPILERS = {name: os.environ.get(name) for name in ("CC", "CXX")}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """The compilers that were asked for, before any fixture builds with them."""
    for name, value in COMPILERS.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Long tests first, each for itself; then file by file, the largest first, so that workers finish together.

    Under pytest-xdist, which reads its marks after this, one worker takes a file: fixtures are made once.
    """
    if config.getoption("loadgroup", False):
        for item in items:
            if not any(item.get_closest_marker(mark) for mark in ("slow", "gpu", "xdist_group")):
                item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    sizes = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, -sizes[item.path]))


@pytest.fixture(autouse=True)
def seeds_and_threads():
    """Every test starts from the same random state and the same number of threads, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` and its kin come back full of NaN (or the largest integer): a value never written shows up."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def small_calls():
    """Tests have small layers, whose calls are taken all the same."""
    with settings.using(small_calls=True):
        yield
