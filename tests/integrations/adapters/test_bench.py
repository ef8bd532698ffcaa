"""``bench --methods`` with AdapterHub's and pyreft's own modules: rows, and the check of results before they are timed."""

from __future__ import annotations

import json

import pytest

from peftkern.benchmarks import bench as command
from peftkern.benchmarks import methods
from peftkern.benchmarks.core.presets import Choice
from peftkern.benchmarks.subjects import stream
from peftkern.testing.residual import EXAMPLES


@pytest.mark.parametrize("name", stream.TIMED)
def test_what_is_timed_computes_what_the_library_does(name):
    for bench, choice in methods.benches([name], Choice(dtypes=["fp32", "bf16"])):
        for case in bench.cases("quick", "cpu", choice):
            assert bench.gate(case) is None, case


def test_rows_name_the_library(tmp_path):
    tiny = ["--device", "cpu", "--shape", "64,32,32", "--seconds", "0.01", "--repeats", "2", "--rank", "4"]
    names = ("bottleneck adapter", "LoReFT")
    argv = ["--methods", *names, *tiny, "--dtype", "fp32", "--json", str(tmp_path / "r.json")]
    assert command.main(argv) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["header"]["versions"]["adapters"].startswith("1.3.")
    found = {row["method"]: row["beside"] for row in result["rows"] if row["skipped"] is None}
    assert found == {f"{name}, {form}": EXAMPLES[name][form].library for name in names for form in stream.TIMED[name]}
