"""``bench --methods`` with AdapterHub's and pyreft's own modules: rows, and the check of results before they are timed."""

from __future__ import annotations

import json

import pytest
import torch

from peftkern.benchmarks import bench as command
from peftkern.benchmarks import methods
from peftkern.benchmarks.core.presets import Choice
from peftkern.benchmarks.subjects import model, stream
from peftkern.testing.residual import EXAMPLES

MODELS = [f"{name} in BERT" for name in model.TIMED]


@pytest.mark.parametrize("name", [*stream.TIMED, *MODELS])
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


def test_a_whole_model(tmp_path):
    sizes = ["--device", "cpu", "--shape", "64,128,128", "--rank", "8", "--seconds", "0.01", "--repeats", "2"]
    assert command.main(["--methods", *MODELS, *sizes, "--limit", "1000", "--json", str(tmp_path / "r.json")]) == 0
    rows = {(r["provider"], r["pass"]): r for r in json.loads((tmp_path / "r.json").read_text())["rows"]}
    for which in ("fwd", "fwd_bwd"):
        base, theirs, ours = (rows[name, which] for name in ("base", "library", "peftkern"))
        assert ours["speed_up"] == pytest.approx(theirs["median_ms"] / ours["median_ms"], rel=1e-3)
        assert ours["ratio_to_base"] == pytest.approx(ours["median_ms"] / base["median_ms"], rel=1e-3)
        assert (ours["op"], ours["beside"], ours["dropout"]) == ("bottleneck_adapter", "adapters", model.DROPOUT)
    # BERT-tiny's two blocks, each with two adapters that keep (M, 8) at least: the adapters act.
    kept = [rows[name, "fwd_bwd"]["saved_bytes"] for name in ("base", "library", "peftkern")]
    assert min(kept[1:]) >= kept[0] + 2 * 2 * 64 * 8 * 4


def test_a_whole_model_that_computes_something_else_is_not_timed(monkeypatch):
    def other(stock):
        ours, names = accelerated(stock)
        with torch.no_grad():
            ours.encoder.layer[0].output.adapters["a"].adapter_up.bias[0] += 1.0
        return ours, names

    accelerated = model.accelerated
    monkeypatch.setattr(model, "accelerated", other)
    for bench, choice in methods.benches(MODELS, Choice()):
        for case in bench.cases("quick", "cpu", choice):
            assert bench.gate(case).startswith("computes something else")
