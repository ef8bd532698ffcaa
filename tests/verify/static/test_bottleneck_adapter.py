"""Every Triton launch of bottleneck_adapter compiles ahead of time and stays within its bounds; see test_lora_linear.py."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is an optional dependency")

from peftkern.verify.static import records
from peftkern.verify.static.launches import bottleneck_adapter as launches
from peftkern.verify.static.triton import ARCHS, key, unavailable

if reason := unavailable():
    pytest.skip(reason, allow_module_level=True)


@pytest.mark.parametrize(
    "arch",
    [pytest.param(a, marks=[pytest.mark.xdist_group(f"aot-bottleneck-sm_{a}"), pytest.mark.slow(25)]) for a in ARCHS],
)
def test_code_and_recorded_bounds(arch, within_bounds):
    within_bounds(launches, ARCHS, arch)


def test_many_rows_are_one_kernel_and_few_are_three():
    names = {
        case.M: {item.name for item in launches.capture(case) if item.name.startswith("bottleneck")}
        for case in launches.standard_cases(90)[::2]
    }
    assert names == {8192: {"bottleneck_kernel"}, 64: {"bottleneck_rank_kernel", "bottleneck_out_kernel"}}


def test_no_bound_is_stale():
    used = {key(item, case.arch) for case in [*launches.STANDARD, *launches.MORE] for item in launches.capture(case)}
    assert records.read(launches.BOUNDS).keys() == used, "variants have changed: record the bounds anew"
