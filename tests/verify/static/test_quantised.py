"""Every Triton launch that reads codes compiles ahead of time and stays within its bounds; see test_lora_linear.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is an optional dependency")

from peftkern.backends.triton.operand import QUANTISED
from peftkern.testing import bases
from peftkern.verify.static import records
from peftkern.verify.static.launches import quantised as launches
from peftkern.verify.static.triton import ARCHS, key, reports, tensors, unavailable, values

if reason := unavailable():
    pytest.skip(reason, allow_module_level=True)


@pytest.mark.parametrize(
    "arch",
    [pytest.param(a, marks=[pytest.mark.xdist_group(f"aot-quantised-sm_{a}"), pytest.mark.slow(25)]) for a in ARCHS],
)
def test_code_and_recorded_bounds(arch, within_bounds):
    within_bounds(launches, ARCHS, arch)


def test_few_rows_are_decoded_in_the_product_and_many_before_it():
    def names_of(**case) -> dict[int, list[str]]:
        return {M: [item.name for item in launches.capture(launches.Case(90, M=M, **case))] for M in (64, 65)}

    names = names_of()
    assert names == {64: ["expand_kernel", "expand_kernel", "row_norm_kernel"],
                     65: ["panel_kernel", "panel_kernel", "row_norm_kernel"]}  # fmt: skip
    assert names_of(many=True) == {64: 2 * ["expand_kernel"], 65: 2 * ["panel_kernel"]}


def test_the_panels_of_many_adapters_are_those_of_one():
    """So that no case of theirs is needed."""
    for base in ("nf4 nested", "int8"):
        one, many = ({key(item, 90) for item in launches.capture(launches.Case(90, base, M=4096, many=many))
                      if item.name == "panel_kernel"} for many in (False, True))  # fmt: skip
        assert one == many and one


@pytest.mark.parametrize("name", bases.QUANTISED)
def test_every_kind_is_launched(name):
    """With all of its tensors, of which those whose memory begins at odd places are said to."""
    case = replace(launches.Case(90), base=name, M=16)
    items = launches.capture(case)
    assert len(items) == 3 and name.split()[0] in QUANTISED
    given, odd = tensors(items[0]), "w.codes:i8-odd" if name == "q8_0" else "w.codes:u8-odd"
    assert {k for k, v in values(items[0]).items() if k.startswith("w.") and v is None}.isdisjoint(given)
    assert (odd in key(items[0], 90)) == (name in ("q4_0", "q8_0"))


def test_accesses_of_single_bytes_are_seen():
    """Where rows of W begin anywhere codes are read one by one, and nowhere else may they be."""
    case = launches.Case(90, "int8", M=4096, K=4095)
    (r,) = reports(launches.capture(case)[:1], case.arch)
    assert not [p for p in launches.widths(r) if "'w.codes'" in p]
    aligned = replace(r, item=launches.capture(replace(case, K=4096))[0])
    assert [p for p in launches.widths(aligned) if "'w.codes', bytes=1" in p]


def test_no_bound_is_stale():
    used = {key(item, case.arch) for case in [*launches.STANDARD, *launches.MORE] for item in launches.capture(case)}
    assert records.read(launches.BOUNDS).keys() == used, "variants have changed: record the bounds anew"
