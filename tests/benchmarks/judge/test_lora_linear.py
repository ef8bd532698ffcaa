"""The arithmetic of the verdict, on rows made by hand."""

from __future__ import annotations

import math

import pytest

from peftkern.benchmarks import report
from peftkern.benchmarks.judge import figures, lora_linear


def row(provider, ms, *, dtype="fp32", M=512, K=1024, N=1024, R=16, dropout=0.0, adapter="fp32", which="fwd_bwd",
        base=10.0, fp32=10.0, **more):  # fmt: skip
    made = dict(
        op="lora_linear", device="cpu", dtype=dtype, adapter_dtype=adapter, M=M, K=K, N=N, R=R, dropout=dropout,
        provider=provider, median_ms=ms, floor_ratio=1.02, bytes_bound_fraction=0.5, skipped=None,
        ratio_to_base=None if ms is None or base is None else ms / base,
        ratio_to_fp32_base=None if ms is None else ms / fp32,
    )  # fmt: skip
    made["pass"] = which
    return made | more


WIDE, NARROW = ({"cpu": {"features": features}} for features in (["avx2", "avx512f"], ["avx2"]))


def by_name(found):
    return {f.name: f for f in found}


def test_geomean():
    assert figures.geomean([1, 4]) == pytest.approx(2)
    assert figures.geomean([]) is None


def test_fp32_limits_use_the_right_rows():
    rows = [
        row("peftkern", 10.5, R=8),
        row("peftkern", 11.0, R=16, dropout=0.1),
        row("peftkern", 99.0, R=64),  # told, not judged
        row("peftkern", 99.0, M=16),  # too few rows
        row("peftkern", 99.0, which="fwd"),
        row("peft", 12.0, R=8),
        row("peft", 13.2, R=16, dropout=0.1),
    ]
    found = by_name(lora_linear.figures({"header": WIDE, "rows": rows}))
    over = found["fp32: over a frozen linear"]
    assert over.value == pytest.approx(math.sqrt(1.05 * 1.1)) and over.ok and over.note == "2 rows"
    faster = found["fp32: faster than PEFT as users run it"]
    assert faster.value == pytest.approx(math.sqrt(12 / 10.5 * 13.2 / 11)) and faster.ok
    assert found["fp32: over a frozen linear, R = 64"].value == pytest.approx(9.9)


def test_bf16_fast_and_slow_have_their_own_limits():
    fast = [
        row("base", 2.0, dtype="bf16", base=2.0, adapter=None, dropout=None),
        row("peftkern", 2.6, dtype="bf16", base=2.0),
        row("peft", 6.0, dtype="bf16", base=2.0),
    ]
    found = by_name(lora_linear.figures({"header": WIDE, "rows": fast}))
    assert found["bf16: over a frozen linear"].ok is False  # 1.3 > 1.25
    assert found["bf16: faster than PEFT as users run it"].ok is True
    slow = [
        row("base", None, dtype="bf16", base=None, adapter=None, dropout=None, skipped="hopelessly slow"),
        row("peftkern", 11.9, dtype="bf16", base=None),
        row("peftkern", 1.0, dtype="bf16", base=None, M=192, K=768, N=1024),
        row("peft", 31.0, dtype="bf16", base=None, M=192, K=768, N=1024),
        row("peftkern", 2.0, dtype="bf16", M=16, K=4096, N=4096, which="fwd"),
        row("base", 11.0, dtype="bf16", M=16, K=4096, N=4096, which="fwd", adapter=None, dropout=None),
        row("peftkern", 2.0, dtype="bf16", M=1, K=4096, N=4096, which="fwd"),
    ]
    found = by_name(lora_linear.figures({"header": WIDE, "rows": slow}))
    assert found["bf16 (slow here): over a frozen fp32 linear"].value == pytest.approx(1.19)
    assert found["bf16 (slow here): faster than PEFT at (192, 768, 1024)"].value == pytest.approx(31)
    assert found["bf16 (slow here): forward at M = 16, torch's own linear over ours"].value == pytest.approx(5.5)
    assert found["bf16 (slow here): forward at M <= 4, share of copy bandwidth"].ok is False  # 0.5 < 0.7


def test_a_cpu_with_avx2_alone_has_limits_of_its_own():
    rows = [
        row("peftkern", 9.9), row("peft", 12.0),
        row("base", None, dtype="bf16", base=None, adapter=None, dropout=None, skipped="hopelessly slow"),
        row("peftkern", 10.3, dtype="bf16", base=None),
    ]  # fmt: skip
    names = ["fp32: over a frozen linear", "fp32: faster than PEFT as users run it",
             "bf16 (slow here): over a frozen fp32 linear"]  # fmt: skip
    for header, limits in ((NARROW, ["<= 0.98", ">= 1.25", "<= 1.02"]), (WIDE, ["<= 1.1", ">= 1.08", "<= 1.2"])):
        found = by_name(lora_linear.figures({"header": header, "rows": rows}))
        assert [found[name].limit for name in names] == limits
        assert {found[name].ok for name in names} == {header is WIDE}


def test_the_share_of_the_peak_is_told_where_it_was_measured():
    name = "fp32: over a frozen linear: share of the peak"
    rows = [row("peftkern", 9.0, flops_bound_fraction=0.8), row("peftkern", 9.0, R=8, flops_bound_fraction=0.2)]
    found = by_name(lora_linear.figures({"header": NARROW, "rows": rows}))
    assert found[name].value == pytest.approx(0.4) and found[name].ok is None
    assert name not in by_name(lora_linear.figures({"header": NARROW, "rows": [row("peftkern", 9.0)]}))


def test_missed_limits_are_told_in_documents():
    bad, good = figures.most("bad", 2.0, 1.1), figures.most("good", 1.0, 1.1)
    assert figures.missed([bad, good, figures.told("told", 9.0)])[2:-1] == ["- bad: 2.000 (limit <= 1.1)"]
    assert figures.missed([good, figures.most("none", None, 1.1)]) == ["This result is within all limits.", ""]


def test_slow_is_also_a_vendor_slower_than_fp32():
    rows = [row("base", 30.0, dtype="fp16", base=30.0, fp32=10.0, adapter=None)]
    assert lora_linear.slow_half(rows, "fp16")
    assert not lora_linear.slow_half([row("base", 3.0, dtype="bf16", fp32=10.0)], "bf16")


def test_addmm_and_reruns():
    rows = [
        row("addmm", 10.0, R=8), row("peftkern", 10.6, R=8),
        row("addmm", 10.0), row("peftkern", 9.8),
        row("addmm", 10.0, which="fwd"), row("peftkern", 99.0, which="fwd"),
    ]  # fmt: skip
    result = {"header": WIDE, "rows": rows, "reruns": []}
    found = by_name(lora_linear.figures(result))
    assert found["fp32 512x1024x1024: over the addmm_ function"].value == pytest.approx(math.sqrt(1.06 * 0.98))
    worst = found["worst row over the addmm_ function"]
    assert worst.ok is False and "1 rows over 5 % not run again" in worst.note
    again = {name: rows[1][name] for name in figures.KEY} | {"ratios": [1.06, 1.01, 1.02], "median": 1.02}
    worst = by_name(lora_linear.figures(result | {"reruns": [again]}))["worst row over the addmm_ function"]
    assert worst.ok is True and worst.value == pytest.approx(1.02)


def test_verdict_exit_code():
    good, bad = figures.Figure("a", 1.0, "<= 1.1", True), figures.Figure("b", 2.0, "<= 1.1", False)
    assert report.verdict([good])[1] == 0
    text, code = report.verdict([good, bad, figures.Figure("c", None, "told", None)])
    assert code == 1 and "MISSED" in text and "n/a" in text


def _result(rows):
    cpu = {"features": ["avx2"], "torch_isa": "AVX2"}
    header = dict(op="lora_linear", device="A CPU", gpu=None, cpu=cpu, threads=2, commit="c" * 40, date="2026-01-02",
                  versions={"torch": "2.13.0", "peft": "0.21.2"})  # fmt: skip
    return {"header": header, "rows": rows}


def test_readme_tables(tmp_path):
    rows = [
        row("base", 10.0, adapter=None, dropout=None), row("peft", 12.0), row("peftkern", 10.4),
        row("addmm", None, skipped="hopelessly slow"), row("peftkern", 55.0, R=64),
    ]  # fmt: skip
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    (results / "a.json").write_text(report.json.dumps(_result(rows)))
    readme.write_text("before\n<!-- benchmarks:lora_linear -->\nstale\n<!-- /benchmarks:lora_linear -->\nafter\n")
    argv = ["--readme", str(readme), "--results", str(results)]
    assert report.main([*argv, "--check"]) == 1
    assert report.main(argv) == 0
    assert report.main([*argv, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert "| **peftkern** |\n" in text  # no floor, and no shares: the peak was not measured
    assert "| 512x1024x1024 | 0 | 10.00 | 1.20 | too slow to time | 1.04 |\n" in text
    (results / "a.json").write_text(report.json.dumps(_result([*rows, row("peft", 14.0, R=8)])))
    assert report.main([*argv, "--check"]) == 1


def test_readme_without_markers_is_an_error(tmp_path, capsys):
    (tmp_path / "README.md").write_text("nothing\n")
    assert report.main(["--readme", str(tmp_path / "README.md"), "--results", str(tmp_path)]) == 1
    assert "benchmarks:OP" in capsys.readouterr().err


def test_the_readme_of_this_repository_is_fresh():
    if not report.README.exists():
        pytest.skip("an installed package has no README")
    if report.MARKERS.search(report.README.read_text()):
        assert report.main(["--check"]) == 0
