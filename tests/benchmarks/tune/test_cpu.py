"""``peftkern tune --cpu``: parts of a table, what of an older file is kept, and from how much work on ours is faster."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from peftkern.backends.cpu import native
from peftkern.benchmarks.measure.rates import fma_peaks
from peftkern.benchmarks.tune import least as tune_least
from peftkern.benchmarks.tune import main as tune
from peftkern.dispatch import cpu_table
from peftkern.dispatch.least import WEIGHT
from peftkern.methods import METHODS
from peftkern.settings import current

pytestmark = pytest.mark.skipif(native._C is None or not native.model()[0], reason="no C++ kernels here, or no x86")


def content(level, **parts):
    cpu = cpu_table.CpuModel(*native.model())
    named = {"vendor": cpu.vendor, "family": cpu.family, "models": [cpu.model] * 2}
    return {
        "schema": 1,
        "meta": {"cpu": named, "level": level._asdict(), "threads": 1, "date": "old"},
        "rows": [],
    } | parts


def test_a_part_is_measured_and_the_rest_is_kept(tmp_path, monkeypatch):
    native.use_isa("auto")
    row = {"dtype": "fp32", "pass": "dx", "D": 8, "C": 8, "M": [4], "us": {"vendor": [1.0]}}
    file = tmp_path / cpu_table.file_name(cpu_table.CpuModel(*native.model()), native.level().isa)
    here = native.level()
    monkeypatch.setattr("peftkern.benchmarks.tune.cpu.TABLES", str(tmp_path / "package"))
    for level, kept in ((here, True), (here._replace(mkl=not here.mkl), False)):
        file.write_text(json.dumps(content(level, least={"a": 3, "b": 4}, rows=[row])))
        monkeypatch.setattr("peftkern.benchmarks.tune.cpu.measure_least", lambda names: {"b": 5})
        assert tune.main(["--cpu", "--only", "rates", "least", "--json", str(file)]) == 0
        data = json.loads(file.read_text())
        assert data["rows"] == ([row] if kept else []) and data["least"] == ({"a": 3, "b": 5} if kept else {"b": 5})
        dates = data["meta"]["parts"]
        assert dates["rates"] == dates["least"] == data["meta"]["date"] and ("products" in dates) == kept
        peaks = data["rates"]["fma_gflop_per_s"]
        assert set(peaks) == {"fp32", "bf16"} and all(rate > 0 for each in peaks.values() for rate in each.values())
        assert data["rates"]["copy_gb_per_s"] > 0
        assert cpu_table.of_model(cpu_table.CpuModel(*native.model()), (str(tmp_path),), here).least == data["least"]


def test_rows_of_dtypes_that_are_not_asked_for_are_kept(tmp_path, monkeypatch):
    native.use_isa("auto")
    rows = [{"dtype": d, "pass": "dx", "D": 8, "C": 8, "M": [4], "us": {"vendor": [1.0]}} for d in ("fp32", "bf16")]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content(native.level(), rows=rows)))
    monkeypatch.setattr("peftkern.benchmarks.tune.cpu.products.SHAPES", ((16, 24),))
    assert tune.main(["--cpu", "--only", "products", "--dtype", "bf16", "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    found = [(row["dtype"], row["pass"], row["D"], row["C"]) for row in data["rows"]]
    assert found == [("fp32", "dx", 8, 8), ("bf16", "forward", 16, 24), ("bf16", "dx", 16, 24)]
    assert data["meta"]["planned"] == data["meta"]["measured"] == 3


def test_the_default_file_is_the_users_and_begins_with_the_packages(tmp_path, monkeypatch):
    name = cpu_table.file_name(cpu_table.CpuModel(*native.model()), native.level().isa)
    for variable in ("OWN_TABLES", "TABLES"):
        monkeypatch.setattr(f"peftkern.benchmarks.tune.cpu.{variable}", str(tmp_path / variable))
    monkeypatch.setattr("peftkern.benchmarks.tune.cpu.measure_least", lambda names: {"a": 1})
    assert tune.main(["--cpu", "--only", "least"]) == 0
    assert [f.name for f in (tmp_path / "OWN_TABLES").iterdir()] == [name]
    row = {"dtype": "fp32", "pass": "dx", "D": 8, "C": 8, "M": [4], "us": {"vendor": [1.0]}}
    (tmp_path / "OWN_TABLES" / name).unlink()
    (tmp_path / "TABLES").mkdir()
    native.use_isa("auto")
    (tmp_path / "TABLES" / name).write_text(json.dumps(content(native.level(), rows=[row], least={"b": 2})))
    assert tune.main(["--cpu", "--only", "least"]) == 0
    data = json.loads((tmp_path / "OWN_TABLES" / name).read_text())
    assert data["rows"] == [row] and data["least"] == {"a": 1, "b": 2}


def test_wider_registers_have_a_higher_peak():
    """Of each level, in the order of their widths; a rate that the loop's results do not explain would not be."""
    try:
        peaks = {}
        for isa in ("plain", "avx2", "avx512"):
            try:
                native.use_isa(isa)
            except ValueError:
                continue
            peaks[isa] = fma_peaks([torch.float32], 1)["fp32"]
    finally:
        native.use_isa(current().cpu_isa)
    assert all(rate > 1e9 for rate in peaks.values())
    if "avx2" in peaks:
        assert peaks["avx2"] > 1.3 * peaks["plain"]
    with pytest.raises(ValueError, match="thread"):
        native._C.fma_peak(False, 1, 0)


def test_thesmallest_amount_from_which_all_win():
    wins = {1: True, 2: False, 4: True, 8: True}
    tried = []

    def won(amount):
        tried.append(amount)
        return wins[amount]

    # One that wins below a loss counts for nothing, and is not tried.
    assert tune_least.smallest(wins, won) == 4 and tried == [8, 4, 2]
    assert tune_least.smallest((1, 2), lambda amount: False) == 4
    assert tune_least.smallest((1, 2), lambda amount: True) == 1


def test_ours_wins_where_no_pass_of_any_layer_takes_longer(monkeypatch):
    pytest.importorskip("peft")
    method, times = METHODS["(IA)^3"], {}
    asked = []

    def medians(calls, seconds):
        asked.append({name: call() for name, call in calls.items()})
        return times

    monkeypatch.setattr(tune_least, "medians", medians)
    probe = tune_least.Probe(
        method.name,
        (1,),
        lambda work: [(method.build(nn.Linear(8, 6).requires_grad_(False), 0), (torch.randn(work, 8),))],
    )
    times |= {"stock": 1.0, "ours": 1.01}
    assert tune_least.wins(probe, 3) and len(asked) == 2
    for results in asked:
        torch.testing.assert_close(results["ours"], results["stock"])
    times["ours"] = 1.03
    assert not tune_least.wins(probe, 3) and len(asked) == 3 + tune_least.AGAIN


def test_every_limit_has_a_probe():
    pytest.importorskip("peft")
    names = {probe.name for probe in tune_least.probes()}
    assert {m.name for m in METHODS.values() if m.loses_small} | {WEIGHT} <= names
    for probe in tune_least.probes():
        if probe.name == "(IA)^3":
            shapes = [(model.base_model.model[0].in_features, args[0].shape) for model, args in probe.calls(1 << 16)]
            assert shapes == [(32, (64, 32)), (64, (16, 64)), (128, (4, 128)), (256, (1, 256))]
