"""The many-adapter kernels compile ahead of time: no spills, no atomics, wide accesses, within recorded bounds.

As in test_lora_linear.py; what must hold is in ``peftkern/verify/static/launches/multi_lora_linear.py``.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is an optional dependency")

from peftkern.verify.static import records
from peftkern.verify.static.launches import multi_lora_linear as launches
from peftkern.verify.static.triton import ARCHS, VERSION, key, unavailable

if reason := unavailable():
    pytest.skip(reason, allow_module_level=True)

GROUPS = {arch: pytest.mark.xdist_group(f"aot-sm_{arch}") for arch in (*ARCHS, 120)}
# Of these, each on one architecture, in turn: ``peftkern verify --static`` takes all, and minutes. sm_120 has no others.
MORE = [cases[i % len(ARCHS)] for i, cases in enumerate(zip(*map(launches.more_cases, ARCHS)))]
MORE += [c for c in launches.MORE if c.arch == 120]
every_case = pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(c, marks=GROUPS[c.arch]) for c in launches.STANDARD),
        *(pytest.param(c, marks=[GROUPS[c.arch], pytest.mark.slow(3)]) for c in MORE),
    ],
    ids=str,
)


def test_every_kernel_is_among_the_launches():
    assert {item.name for case in launches.STANDARD for item in launches.capture(case)} == launches.TILES.keys()


@every_case
def test_fits_without_spills(case, reports):
    for r in reports(launches, case):
        assert not launches.resources(r), r.key


@every_case
def test_no_atomics(case, reports):
    for r in reports(launches, case):
        assert not launches.atomics(r), r.key


@every_case
def test_memory_accesses_are_wide(case, reports):
    """Each access of a block moves 16 bytes, or at least a thread's share of the block."""
    for r in reports(launches, case):
        assert not launches.widths(r), r.key


@every_case
def test_products_and_copies(case, reports):
    """Matrix instructions in half precision; what a loop of them reads is copied ahead, asynchronously."""
    for r in reports(launches, case):
        assert not launches.instructions(r), r.key


@every_case
def test_registers_and_shared_memory_within_recorded_bounds(case, reports):
    bounds, unknown = records.read(launches.BOUNDS), 0
    for r in reports(launches, case):
        assert not records.broken(r.row, bounds.get(r.key, {})), r.key
        unknown += VERSION not in bounds[r.key]
    if unknown:
        pytest.skip(f"registers differ between versions of Triton, and none were recorded with {VERSION}")


def test_no_bound_is_stale():
    used = {key(item, case.arch) for case in [*launches.STANDARD, *launches.MORE] for item in launches.capture(case)}
    assert records.read(launches.BOUNDS).keys() == used, "variants have changed: record the bounds anew"
