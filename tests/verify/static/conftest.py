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


@pytest.fixture
def within_bounds():
    """(launches, case) -> None: what the case launches compiles, passes its checks and stays within its recorded bounds."""
    from peftkern.verify.static import records
    from peftkern.verify.static.triton import VERSION

    def check_case(launches, case) -> None:
        bounds, unknown = records.read(launches.BOUNDS), 0
        for r in launches.reports(case):
            assert not [p for check in launches.CHECKS for p in check(r)], r.key
            assert not records.broken(r.row, bounds.get(r.key, {})), r.key
            unknown += VERSION not in bounds[r.key]
        if unknown:
            pytest.skip(f"registers differ between versions of Triton, and none were recorded with {VERSION}")

    return check_case
