"""Conditions that hold for every test: fixed seeds, at most two threads in all, uninitialised memory shown as NaN."""

from __future__ import annotations

import collections
import gc
import itertools
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


def _unit(item) -> str:
    """What one worker runs at a stretch: a group, a test that is slow (or wants a GPU) for itself, of others a file."""
    if group := item.get_closest_marker("xdist_group"):
        return group.args[0]
    alone = any(item.get_closest_marker(mark) for mark in ("slow", "gpu"))
    return item.nodeid if alone else item.nodeid.partition("::")[0]


def _weight(items: list) -> tuple[float, int]:
    """Seconds that their marks say, and number of tests."""
    return sum(mark.args[0] for item in items if (mark := item.get_closest_marker("slow"))), len(items)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """The longest first, so that workers finish together. Under pytest-xdist, which reads its marks after this, one worker
    takes a file: fixtures are made once."""
    units = collections.defaultdict(list)
    for item in items:
        name = _unit(item)
        units[name].append(item)
        if config.getoption("loadgroup", False) and name != item.nodeid and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(name))
    items[:] = itertools.chain.from_iterable(sorted(units.values(), key=_weight, reverse=True))


def pytest_collection_finish():
    """What was imported and collected stays to the end: no collection of garbage during the tests walks through it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """The interpreter takes it all down at exit as usual."""
    gc.unfreeze()


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
