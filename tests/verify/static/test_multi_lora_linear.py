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

# sm_120 has the registers of sm_90, less shared memory and neither wgmma nor tensor memory.
EVERY = (*ARCHS, 120)
every_arch = pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=[pytest.mark.xdist_group(f"aot-multi-sm_{a}"), pytest.mark.slow(8)]) for a in EVERY]
)


def test_every_kernel_is_among_the_launches():
    assert {item.name for case in launches.STANDARD for item in launches.capture(case)} == launches.TILES.keys()


@every_arch
def test_fits_without_spills(arch, reports):
    assert reports(launches, EVERY, arch)
    for r in reports(launches, EVERY, arch):
        assert not launches.resources(r), r.key


@every_arch
def test_no_atomics(arch, reports):
    for r in reports(launches, EVERY, arch):
        assert not launches.atomics(r), r.key


@every_arch
def test_memory_accesses_are_wide(arch, reports):
    """Each access of a block moves 16 bytes, or at least a thread's share of the block."""
    for r in reports(launches, EVERY, arch):
        assert not launches.widths(r), r.key


@every_arch
def test_products_and_copies(arch, reports):
    """Matrix instructions in half precision; what a loop of them reads is copied ahead, asynchronously."""
    for r in reports(launches, EVERY, arch):
        assert not launches.instructions(r), r.key


@every_arch
def test_registers_and_shared_memory_within_recorded_bounds(arch, reports):
    bounds, unknown = records.read(launches.BOUNDS), 0
    for r in reports(launches, EVERY, arch):
        assert not records.broken(r.row, bounds.get(r.key, {})), r.key
        unknown += VERSION not in bounds[r.key]
    if unknown:
        pytest.skip(f"registers differ between versions of Triton, and none were recorded with {VERSION}")


def test_no_bound_is_stale():
    used = {key(item, case.arch) for case in [*launches.STANDARD, *launches.MORE] for item in launches.capture(case)}
    assert records.read(launches.BOUNDS).keys() == used, "variants have changed: record the bounds anew"
