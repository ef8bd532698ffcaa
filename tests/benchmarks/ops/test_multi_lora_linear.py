"""A tiny benchmark with many adapters from the command line to JSON, table and plots."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from peftkern.benchmarks import bench as command
from peftkern.benchmarks.core.case import COPY, OWN_BASE, Case
from peftkern.benchmarks.core.presets import Choice
from peftkern.benchmarks.measure.runner import Runner, Settings
from peftkern.benchmarks.ops import multi_lora_linear
from peftkern.benchmarks.registry import OPS

pytest.importorskip("peft")

BENCH = OPS["multi_lora_linear"]
REQUIRED = {
    "op", "device", "dtype", "adapter_dtype", "M", "N", "K", "R", "dropout", "provider", "pass", "floor_ratio",
    "floor_by", "ratio_to_fp32_base", "flops_bound_fraction", "bytes_bound_fraction", "min_ms", "p25_ms", "p75_ms", "repeats",
}  # fmt: skip
MANY = {"adapters", "mix", "base_share", "ranks", "phase", "ratio_to_best_base", "copy_gb_per_s"}
TINY = ["--op", "multi_lora_linear", "--device", "cpu", "--rank", "8", "--seconds", "0.02", "--repeats", "3"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("bench")
    argv = [*TINY, "--shape", "24,40,32", "300,40,32", "--dtype", "fp32", "--adapters", "2", "4", "--mix", "uniform",
            "--base-share", "0", "--ranks", "same", "--no-gate", "--json", str(folder / "r.json"), "--plot",
            str(folder)]  # fmt: skip
    assert command.main(argv) == 0
    # 24 rows forward, 300 rows both passes
    assert len(list(folder.glob("*.png"))) == 3
    return json.loads((folder / "r.json").read_text())


def test_rows_are_complete(result):
    optional = BENCH.providers["polylora"].missing()
    for row in result["rows"]:
        assert REQUIRED | MANY <= set(row)
        assert row["skipped"] == (optional if row["provider"] == "polylora" else None), row
        if row["skipped"]:
            continue
        assert row["median_ms"] > 0 and row["ratio_to_base"] > 0 and row["copy_gb_per_s"] > 0
        assert row["provider"] in (COPY, OWN_BASE) or row["ratio_to_best_base"] >= row["ratio_to_base"] * 0.98


def test_providers_and_passes(result):
    def names(**want):
        return [r["provider"] for r in result["rows"] if all(r[k] == v for k, v in want.items())]

    serving = ["base", "base_own", "copy", "loop", "gather", "grouped_mm", "peft", "peftkern", "peftkern_bank"]
    decoding = [*serving[:7], "polylora", *serving[7:], "sgmv", "sgmv_list", "gather_branch"]
    assert names(**{"M": 24, "adapters": 2}) == decoding
    assert names(**{"M": 300, "adapters": 4, "pass": "fwd"}) == serving
    training = ["base", "base_own", "loop", "grouped_mm", "peftkern"]
    assert names(**{"M": 300, "adapters": 4, "pass": "fwd_bwd"}) == training
    assert {r["phase"] for r in result["rows"] if r["M"] == 24} == {"decode"}


@pytest.mark.parametrize("name", ["sgmv", "sgmv_list"])
def test_the_branch_has_its_own_bound(result, name):
    row = next(r for r in result["rows"] if r["provider"] == name and r["adapters"] == 4)
    moved = 4 * (24 * 40 + 24 * 32 + 4 * 8 * 72)
    expected = moved / (row["copy_gb_per_s"] * 1e9) / (row["median_ms"] / 1e3)
    assert row["bytes_bound_fraction"] == pytest.approx(expected, rel=0.05, abs=2e-4)
    base = row["median_ms"] / row["ratio_to_base"]
    flops = 2 * 24 * 8 * 72 / result["header"]["fma_gflop_per_s"]["fp32"] / 1e9
    assert row["flops_bound_fraction"] == pytest.approx(flops / (row["median_ms"] / 1e3), rel=0.05, abs=2e-4)
    assert row["floor_by"] == ("bytes" if moved / row["copy_gb_per_s"] / 1e9 > flops else "flops")
    least = max(moved / row["copy_gb_per_s"] / 1e9, flops)
    assert row["floor_ratio"] == pytest.approx(least / (base / 1e3), rel=0.05, abs=2e-4)
    copied = next(r for r in result["rows"] if r["provider"] == COPY)
    assert copied["flops_bound_fraction"] is None and copied["floor_by"] == "bytes"
    assert copied["bytes_bound_fraction"] == pytest.approx(1)
    assert copied["copy_gb_per_s"] == pytest.approx((2 << 20) / copied["median_ms"] / 1e6, rel=0.01)


def test_lora_linear_rows_have_no_such_fields(tmp_path):
    file = tmp_path / "r.json"
    argv = ["--device", "cpu", "--shape", "8,16,16", "--rank", "4", "--dropout", "0", "--dtype", "fp32", "--seconds",
            "0.01", "--provider", "peftkern", "--no-gate", "--json", str(file)]  # fmt: skip
    assert command.main(argv) == 0
    for row in json.loads(file.read_text())["rows"]:
        assert not MANY & set(row)
    assert OPS["lora_linear"].cases("quick", "cpu")[0].many == {}


@pytest.mark.parametrize("argv, message", [
    (["--op", "lora_linear", "--adapters", "3"], "--adapters means nothing to lora_linear"),
    (["--op", "multi_lora_linear", "--provider", "addmm"], "has no provider addmm"),
    (["--op", "multi_lora_linear", "--base-share", "1.5"], "--base-share from 0 to 1"),
    (["--op", "multi_lora_linear", "--adapters", "0"], "--adapters must be at least 1"),
])  # fmt: skip
def test_wrong_options_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        command.main([*argv, "--device", "cpu"])
    assert message in capsys.readouterr().err


def test_options_replace_fields_of_the_preset():
    cases = BENCH.cases("full", "cpu", Choice(mixes=["zipf"], counts=[4], base_shares=[0.0, 0.5], rank_kinds=["mixed"],
                                              dtypes=["fp32"], ranks=[8]))  # fmt: skip
    assert {(c.mix, c.adapters, c.ranks, c.R) for c in cases} == {("zipf", 4, "mixed", 8)}
    assert {c.base_share for c in cases} == {0.0, 0.5}
    assert len(set(cases)) == len(cases)
    assert {c.phase for c in cases if c.M <= 256} == {"decode"} and {c.phase for c in cases if c.M > 256} == {
        "training"
    }


def test_full_preset_has_what_was_agreed():
    cases = BENCH.cases("full", "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        own = [c for c in cases if c.dtype == dtype]
        assert {c.mix for c in own} == {"distinct", "uniform", "zipf", "identical", "skewed"}
        assert {c.base_share for c in own if c.phase == "decode"} == {0.0, 0.5, 1.0}
        assert {c.base_share for c in own if c.phase == "training"} == {0.0, 0.5, 1.0}
        assert {c.M for c in own if c.phase == "decode"} == {1, 4, 16, 32, 64, 128, 256}
        assert {c.M for c in own if c.phase == "training"} == {512, 2048}
        assert {c.ranks for c in own} == {"same", "mixed"}


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_every_judged_case_is_measured(preset):
    cases = [c for c in BENCH.cases(preset, "cpu") if (c.K, c.N, c.R, c.ranks, c.base_share) ==
             (4096, 4096, 16, "same", 0.0)]  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        for M, adapters, names in (
            (32, 32, {"sgmv", "sgmv_list", "gather_branch", OWN_BASE, COPY}),
            (512, 8, {"peftkern", "peftkern_bank", OWN_BASE}),
            (2048, 8, {"peftkern", OWN_BASE}),
        ):
            mine = [c for c in cases if (c.dtype, c.M, c.adapters) == (dtype, M, adapters) and c.mix != "zipf"]
            assert any(names <= set(BENCH.plan(c, preset)) for c in mine)


CASE = Case("multi_lora_linear", "cpu", torch.float32, torch.float32, 16, 32, 32, 8, 0.0, 3, "uniform", 0.0, "same",
            "decode")  # fmt: skip


@pytest.mark.parametrize("changes", [
    dict(), dict(mix="skewed", ranks="mixed"), dict(mix="identical", base_share=0.5), dict(base_share=1.0),
    dict(phase="training", M=300, dropout=0.1), dict(adapters=40, mix="distinct"),
])  # fmt: skip
def test_the_gate_passes_what_is_right(changes):
    assert multi_lora_linear.gate(dataclasses.replace(CASE, **changes)) is None


@pytest.mark.parametrize("phase", ["decode", "training"])
def test_the_gate_finds_a_wrong_op(monkeypatch, phase):
    from peftkern.testing import accuracy

    right = accuracy.run_ours
    wrong = lambda p, *a: {k: v * (1.01 if p.branch else 1.0) for k, v in right(p, *a).items()}  # noqa: E731
    monkeypatch.setattr(accuracy, "run_ours", wrong)
    assert "failed the accuracy check (sgmv: y " in multi_lora_linear.gate(dataclasses.replace(CASE, phase=phase))


def test_a_wrong_result_is_not_timed():
    bench = dataclasses.replace(BENCH, gate=lambda case: "failed the accuracy check (list: y 9.00x)")
    settings = Settings(preset="quick", seconds=0.02, bandwidth=1e10, min_repeats=3)
    rows = {r["provider"]: r for r in next(Runner(bench, settings).run([CASE]))}
    for name in ("peftkern", "peftkern_bank", "sgmv", "sgmv_list"):
        assert rows[name]["median_ms"] is None and "failed the accuracy check" in rows[name]["skipped"]
    assert rows["loop"]["median_ms"] > 0


def test_no_two_providers_of_a_round_read_the_same_set(monkeypatch):
    from peftkern.benchmarks.measure import runner

    seen = {}

    def spy(entries, copies, **kwargs):
        seen.update({e.name: e.shift for e in entries}, copies=copies)
        return 0

    monkeypatch.setattr(runner, "interleave", spy)
    bench = dataclasses.replace(BENCH, copies=lambda case, cache: 16)
    next(Runner(bench, Settings(preset="quick", seconds=0.0, bandwidth=1e10, gate=False)).run([CASE]))
    assert seen.pop("copies") == 16
    count = 12 + (BENCH.providers["polylora"].missing() is None)
    assert len(seen) == count and len(set(seen.values())) == count
