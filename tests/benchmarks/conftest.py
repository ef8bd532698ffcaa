"""Runs of the command share what they measure of the machine."""

from __future__ import annotations

import functools

import pytest

from peftkern.benchmarks import bench


@pytest.fixture(scope="session", autouse=True)
def rates_once():
    """Measured at the first run that asks; tests/benchmarks/measure/test_rates.py is of the measurements themselves."""
    peaks = functools.cache(bench.fma_peaks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "copy_bandwidth", functools.cache(bench.copy_bandwidth))
        patch.setattr(bench, "fma_peaks", lambda dtypes, threads: dict(peaks(tuple(dtypes), threads)))
        yield
