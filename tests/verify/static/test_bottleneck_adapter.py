"""Every Triton launch of bottleneck_adapter compiles ahead of time and stays within its bounds; see test_lora_linear.py."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is an optional dependency")

from peftkern.verify.static import records
from peftkern.verify.static.launches import bottleneck_adapter as launches
from peftkern.verify.static.triton import ARCHS, key, unavailable

if reason := unavailable():
    pytest.skip(reason, allow_module_level=True)

GROUPS = {arch: pytest.mark.xdist_group(f"aot-bottleneck-sm_{arch}") for arch in (*ARCHS, 120)}
CASES = [pytest.param(c, marks=GROUPS[c.arch]) for c in launches.STANDARD]
# Of the others, compiled on one architecture: ``peftkern verify --static`` takes all, and minutes.
CASES += [pytest.param(c, marks=[GROUPS[c.arch], pytest.mark.slow(3)]) for c in launches.MORE if c.arch == 90]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_code_and_recorded_bounds(case, within_bounds):
    within_bounds(launches, case)


def test_many_rows_are_one_kernel_and_few_are_three():
    names = {
        case.M: {item.name for item in launches.capture(case) if item.name.startswith("bottleneck")}
        for case in launches.standard_cases(90)[::2]
    }
    assert names == {8192: {"bottleneck_kernel"}, 64: {"bottleneck_rank_kernel", "bottleneck_out_kernel"}}


def test_no_bound_is_stale():
    used = {key(item, case.arch) for case in [*launches.STANDARD, *launches.MORE] for item in launches.capture(case)}
    assert records.read(launches.BOUNDS).keys() == used, "variants have changed: record the bounds anew"
