"""A new op is a file with a Bench and a name in the registry: command, tables, plots, documents and verdict follow."""

from __future__ import annotations

import json

import pytest
import torch.nn.functional as F

from peftkern.benchmarks import bench as command
from peftkern.benchmarks import registry, report
from peftkern.benchmarks.core.bench import Bench, View
from peftkern.benchmarks.core.case import Provider, Step
from peftkern.benchmarks.core.presets import Entry
from peftkern.benchmarks.judge.figures import mean, most
from peftkern.benchmarks.peers.data import BASES, make_data


def _twice(case, data):
    return Step(lambda i: 2 * F.linear(data.x[i], data.weight[i]), [[x] for x in data.x], data.dy, data.weight)


def _judge(result):
    return [most("twice", mean((r for r in result["rows"] if r["provider"] == "peftkern"), "ratio_to_base"), 1e9)]


@pytest.fixture
def new_op(monkeypatch):
    providers = {p.name: p for p in (*BASES, Provider("peftkern", "peftkern", _twice))}
    presets = {"quick": (Entry(24, 16, 32, R=(8,), adapter_dtypes=("fp32",), dropouts=(0.0, 0.1)),)}
    bench = Bench(
        "new_op", providers, presets, make_data, lambda case, preset: ["peftkern"], lambda case: None, judge=_judge,
        views={"size": View(lambda result: [f"{len(result['rows'])} rows"])},
    )  # fmt: skip
    monkeypatch.setitem(registry.OPS, "new_op", bench)
    monkeypatch.setitem(report.VIEWS, "size_new_op", ("new_op", bench.views["size"]))


def test_one_file_and_one_name(new_op, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "r.json"
    argv = ["--op", "new_op", "--device", "cpu", "--seconds", "0.01", "--dtype", "fp32", "--json", str(file), "--plot"]
    assert command.main([*argv, str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "new_op fp32, forward + backward: times over the frozen linear" in out and "24x16x32" in out
    assert {p.name for p in tmp_path.glob("*.png")} == {"new_op-fp32-rows.png", "new_op-fp32-shapes.png"}
    rows = json.loads(file.read_text())["rows"]
    # The base, and ours with each dropout, both passes.
    assert len(rows) == 6 and all(r["median_ms"] > 0 and r["floor_by"] in ("flops", "bytes") for r in rows)
    assert report.main(["--judge", str(file)]) == 0 and "ok" in capsys.readouterr().out
    document = tmp_path / "README.md"
    names = ("benchmarks:new_op", "benchmarks:size_new_op")
    document.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in names))
    assert report.main(["--readme", str(document), "--results", str(tmp_path)]) == 0
    text = document.read_text()
    assert (
        "| M x K x N | dropout | frozen linear, ms | **peftkern** | floor | of peak, of copy |" in text
        and "\n6 rows" in text
    )
