"""A tiny benchmark from the command line to JSON, table and plots."""

from __future__ import annotations

import json

import pytest

from peftkern.benchmarks import bench as command
from peftkern.benchmarks import registry

pytest.importorskip("peft")

REQUIRED = {
    "op", "device", "dtype", "adapter_dtype", "M", "N", "K", "R", "dropout", "provider", "pass", "median_ms",
    "ratio_to_base", "ratio_to_fp32_base", "floor_ratio", "floor_by", "floor_over", "flops_bound_fraction",
    "bytes_bound_fraction", "min_ms", "p25_ms", "p75_ms",
    "repeats", "skipped", "others_cores",
}  # fmt: skip
HEADER = {
    "versions",
    "device",
    "cpu",
    "threads",
    "settings",
    "commit",
    "date",
    "copy_gb_per_s",
    "fma_gflop_per_s",
    "base_products",
}
TINY = ["--device", "cpu", "--shape", "24,40,32", "--rank", "4", "--seconds", "0.05", "--repeats", "5"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("bench")
    argv = [*TINY, "--dtype", "fp32", "bf16", "--provider", "peft", "addmm", "peftkern", "--adapter-dtype", "fp32",
            "same", "--no-gate", "--json", str(folder / "r.json"), "--plot", str(folder), "--memory"]  # fmt: skip
    assert command.main(argv) == 0
    assert len(list(folder.glob("*.png"))) == 4
    return json.loads((folder / "r.json").read_text())


def test_progress_says_what_is_done_and_how_long_the_rest_takes(monkeypatch, capsys):
    monkeypatch.setattr("peftkern.screen.LOG_SECONDS", 0.0)
    argv = [
        *TINY,
        "--dtype",
        "fp32",
        "--rank",
        "4",
        "2",
        "--dropout",
        "0",
        "--provider",
        "addmm",
        "peftkern",
        "--no-gate",
    ]
    assert command.main(argv) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if " gone, about " in line]
    assert any("1 of 2: fp32 24x40x32 R=4: warming up peftkern" in line for line in lines)
    assert any("2 of 2: fp32 24x40x32 R=2: timing all in turn" in line for line in lines) and "100%" in lines[-1]
    shares = [int(line.split("%")[0]) for line in lines]
    assert shares == sorted(shares) and len(set(shares)) > 10
    # The table has the spread of every time.
    row = next(line for line in out.splitlines() if line.split()[:2] == ["24x40x32", "4"])
    assert row.count("±") == 3 and "quartiles of the rounds" in out


def test_rows_are_complete(result):
    assert HEADER <= set(result["header"])
    assert result["header"]["copy_gb_per_s"] > 0
    for row in result["rows"]:
        assert REQUIRED <= set(row)
        assert row["skipped"] is None, row
        assert row["repeats"] >= 5
        assert 0 < row["min_ms"] <= row["p25_ms"] <= row["median_ms"] <= row["p75_ms"]
        assert row["ratio_to_base"] > 0 and row["ratio_to_fp32_base"] > 0


def test_every_case_has_every_provider_and_pass(result):
    def count(**want):
        return sum(all(row[k] == v for k, v in want.items()) for row in result["rows"])

    # fp32: two dropouts; bf16: two dropouts and two adapter dtypes
    for provider in ("peft", "addmm", "peftkern"):
        for which in ("fwd", "fwd_bwd"):
            assert count(**{"provider": provider, "pass": which, "dtype": "fp32"}) == 2
            assert count(**{"provider": provider, "pass": which, "dtype": "bf16"}) == 4
    assert count(provider="base") == 4
    assert count(provider="base_fp32", dtype="bf16") == 2


def test_base_rows(result):
    base = [row for row in result["rows"] if row["provider"] == "base"]
    assert all(row["ratio_to_base"] == 1 for row in base)
    assert all(row["adapter_dtype"] is None and row["dropout"] is None for row in base)


def test_shares_are_of_the_rates_in_the_header(result):
    header, (M, K, N, R) = result["header"], (24, 40, 32, 4)
    peaks = {name: rate * 1e9 for name, rate in header["fma_gflop_per_s"].items()}
    assert set(peaks) == {"fp32", "bf16"}
    for row in result["rows"]:
        dtype = "fp32" if row["provider"] == "base_fp32" else row["dtype"]
        passes, size = (1, 2) if row["pass"] == "fwd" else (2, 6), 4 if dtype == "fp32" else 2
        flops, moved = 2 * passes[0] * M * K * N, passes[0] * size * (M * K + K * N + M * N)
        if not row["provider"].startswith("base"):
            adapter = 4 if row["adapter_dtype"] == "fp32" else 2
            flops += passes[1] * M * R * (K + N)
            moved += size * M * K + adapter * R * (K + N)
            if row["pass"] == "fwd_bwd":
                moved += size * M * (N + K) + 2 * adapter * R * (K + N)
        seconds = {"flops": flops / peaks[dtype], "bytes": moved / header["copy_gb_per_s"] / 1e9}
        for bound, least in seconds.items():
            assert row[f"{bound}_bound_fraction"] == pytest.approx(1e3 * least / row["median_ms"], rel=0.01, abs=2e-4)
        assert row["floor_by"] == max(seconds, key=seconds.get) and row["floor_over"] == "base"
        base = row["median_ms"] / row["ratio_to_base"]
        assert row["floor_ratio"] == pytest.approx(1e3 * max(seconds.values()) / base, rel=0.01, abs=2e-4)


def test_saved_bytes(result):
    def saved(provider, dtype, dropout):
        rows = [r for r in result["rows"] if r["provider"] == provider and r["pass"] == "fwd_bwd"]
        return next(r["saved_bytes"] for r in rows if r["dtype"] == dtype and r["dropout"] in (None, dropout))

    M, K, R = 24, 40, 4
    assert saved("base", "bf16", None) == 0  # the weight is no cost
    for dropout in (0.0, 0.1):
        ours = saved("peftkern", "bf16", dropout)
        assert 2 * M * K <= ours <= 2 * M * K + 4 * M * R + 64
    # PEFT casts x to fp32 and keeps it; with dropout it keeps the mask as well
    assert saved("peft", "bf16", 0.0) >= 4 * M * K
    assert saved("addmm", "fp32", 0.0) == 4 * M * K + 4 * M * R


def test_json_can_be_read_row_by_row(result, tmp_path):
    command.write(tmp_path / "r.json", result)
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text) == result
    assert sum(line.startswith('  {"op"') for line in text.splitlines()) == len(result["rows"])


def test_nothing_to_do_is_an_error(capsys):
    assert command.main([*TINY, "--dtype", "fp32", "--adapter-dtype", "bf16"]) == 2


def test_bad_shape_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--shape", "3,4"])
    assert "not M,K,N" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_presets(preset):
    for name, op in registry.OPS.items():
        cases = op.cases(preset, "cpu")
        assert cases and all(case.op == name for case in cases)
        assert len(set(cases)) == len(cases)
        assert all(set(op.plan(case, preset)) <= set(op.providers) for case in cases)
        assert all("peftkern" in op.plan(case, preset) for case in cases)


def test_full_preset_is_the_agreed_one():
    cases = registry.OPS["lora_linear"].cases("full", "cpu")
    shapes = {(512, 1024, 1024), (2048, 1024, 1024), (2048, 4096, 4096), (1024, 4096, 14336), (1024, 14336, 4096),
              (16, 4096, 4096), (1, 4096, 4096)}  # fmt: skip
    for dtype in ("torch.float32", "torch.bfloat16"):
        own = [c for c in cases if str(c.dtype) == dtype]
        assert shapes <= {c.shape for c in own}
        for shape in shapes:
            mine = [c for c in own if c.shape == shape]
            kinds = 1 if dtype == "torch.float32" else 2
            assert len(mine) == 3 * 2 * kinds
            assert {c.R for c in mine} == {8, 16, 64} and {c.dropout for c in mine} == {0.0, 0.1}
