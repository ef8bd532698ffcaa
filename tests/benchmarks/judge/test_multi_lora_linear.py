"""The verdict and the README table of many adapters, on rows made by hand."""

from __future__ import annotations

import pytest

from peftkern.benchmarks import report
from peftkern.benchmarks.judge import multi_lora_linear


def row(provider, ms, *, dtype="bf16", M=512, adapters=8, which="fwd", base=10.0, best=None, **more):
    made = dict(
        op="multi_lora_linear", device="cpu", dtype=dtype, adapter_dtype=dtype, M=M, K=4096, N=4096, R=16, dropout=0.0,
        provider=provider, median_ms=ms, floor_ratio=1.02, bytes_bound_fraction=0.6, skipped=None, adapters=adapters,
        mix="uniform", base_share=0.0, ranks="same", phase="decode" if M <= 256 else "training", copy_gb_per_s=20.0,
        ratio_to_base=None if ms is None or base is None else ms / base, ratio_to_fp32_base=None,
        ratio_to_best_base=None if ms is None else ms / (best or base),
    )  # fmt: skip
    made["pass"] = which
    return made | more


def figures(rows, features=("avx2", "avx512f")):
    result = {"header": {"cpu": {"features": features}}, "rows": rows}
    return {f.name: f for f in multi_lora_linear.figures(result)}


def test_forward_is_held_against_the_faster_base():
    found = figures([row("peftkern", 11.0, best=9.0), row("peftkern_bank", 9.8, best=9.0, M=480)])
    listed = found["bf16: 480 to 512 rows, 8 adapters, list: over the best base"]
    assert listed.value == pytest.approx(11 / 9) and listed.ok is False and "1.100" in listed.note
    assert found["bf16: 480 to 512 rows, 8 adapters, bank: over the best base"].ok is True


def test_rows_that_are_not_the_judged_case_are_left_out():
    others = [row("peftkern", 99.0, **changes) for changes in (
        dict(mix="zipf"), dict(ranks="mixed"), dict(base_share=0.5), dict(R=64), dict(N=14336), dict(dropout=0.1),
        dict(adapters=4), dict(M=2048), dict(which="fwd_bwd"),
    )]  # fmt: skip
    assert figures([*others, row("peftkern", 11.0)])[
        "bf16: 480 to 512 rows, 8 adapters, list: over the best base"
    ].value == pytest.approx(1.1)


def test_decode():
    rows = [row("sgmv", 1.0, M=32, adapters=32, mix="distinct", bytes_bound_fraction=0.59),
            row("gather_branch", 11.0, M=32, adapters=32, mix="distinct")]  # fmt: skip
    found = figures(rows)
    assert found["bf16: branch at 32 rows, 32 adapters: share of copy bandwidth"].ok is False
    speed = "branch over gather + einsum, speed-up at 32 rows, 32 adapters"
    assert found[f"bf16: {speed}"].value == pytest.approx(11) and found[f"bf16: {speed}"].ok is True
    fp32 = figures([r | dict(dtype="fp32", adapter_dtype="fp32") for r in rows])
    assert fp32[f"fp32: {speed}"].ok is None and fp32[f"fp32: {speed}"].value == pytest.approx(11)


def test_decode_of_a_list_where_it_was_measured():
    name = "bf16: branch of a list at 32 rows, 32 adapters: share of copy bandwidth"
    rows = [row("sgmv", 1.0, M=32, adapters=32, mix="distinct", bytes_bound_fraction=0.7)]
    assert name not in figures(rows)
    for share in (0.59, 0.61):
        listed = row("sgmv_list", 1.2, M=32, adapters=32, mix="distinct", bytes_bound_fraction=share)
        assert figures([*rows, listed])[name].value == share and figures([*rows, listed])[name].ok is (share > 0.6)


def test_decode_at_other_sizes():
    name = "bf16, 3072x3072: branch at 32 rows, 32 adapters: share of copy bandwidth"
    rows = [row("sgmv", 1.0, M=32, adapters=32, mix="distinct", K=3072, N=3072, bytes_bound_fraction=0.61)]
    assert figures(rows)[name].ok is True and name not in figures([row("peftkern", 11.0)])


def test_gather_has_another_limit_where_the_cpu_has_avx2_alone():
    rows = [row(name, ms, M=32, adapters=32, mix="distinct") for name, ms in (("sgmv", 1.0), ("gather_branch", 8.0))]
    name = "bf16: branch over gather + einsum, speed-up at 32 rows, 32 adapters"
    assert figures(rows, ["avx2"])[name].ok is True and figures(rows)[name].ok is False


def test_our_product_is_held_where_the_cpu_has_avx2_alone():
    common = dict(dtype="fp32", adapter_dtype=None, dropout=None, flops_bound_fraction=0.72)
    rows = [row("base_own", 8.0, **common), row("base_own", 10.1, **common, M=1536, K=1536, N=6144),
            row("base_own", 99.0, **common, M=64)]  # fmt: skip
    own = "fp32: own base product from 512 rows on, fwd: "
    found = figures(rows, ["avx2"])
    assert found[own + "over the vendor's, speed-up"].value == pytest.approx((1 / 0.8 / 1.01) ** 0.5)
    assert found[own + "over the vendor's, speed-up"].ok is True
    assert found[own + "over the vendor's, least speed-up"].ok is False
    assert found[own + "share of the peak"].ok is True
    assert figures(rows)[own + "share of the peak"].ok is None
    # Told in other dtypes, and without a share where no peak was measured.
    bf16 = figures([row("base_own", 8.0, adapter_dtype=None, dropout=None)], ["avx2"])
    assert bf16["bf16: own base product from 512 rows on, fwd: over the vendor's, speed-up"].ok is None
    assert not any("share of the peak" in name for name in bf16)


def test_training_and_a_frozen_linear_that_is_hopeless():
    name = "bf16: 2048 rows, 8 adapters, forward + backward: over the "
    fast = figures([row("peftkern", 12.9, M=2048, which="fwd_bwd", best=8.0)])
    assert fast[name + "frozen linear"].ok is True
    assert fast[name + "best base"].ok is None and fast[name + "best base"].value == pytest.approx(12.9 / 8)
    slow = figures([row("peftkern", 12.9, M=2048, which="fwd_bwd", base=None, best=9.0)])
    assert slow[name + "best base (no frozen linear)"].ok is False


def test_adapter_dtypes_are_judged_apart():
    found = figures([row("peftkern", 11.0), row("peftkern", 13.0, adapter_dtype="fp32")])
    assert found["bf16: 480 to 512 rows, 8 adapters, list: over the best base"].ok is True
    assert found["bf16, fp32 adapters: 480 to 512 rows, 8 adapters, list: over the best base"].ok is False
    assert not any("fp32 adapters: branch" in name for name in found)


def test_nothing_measured_is_no_verdict():
    assert all(f.ok is None for f in figures([row("peftkern", None, skipped="hopelessly slow")]).values())


def test_all_base_rows_are_told():
    found = figures([row("peftkern", 10.1, base_share=1.0)])
    assert found["bf16: 512 rows, none with an adapter, fwd: over the best base"].value == pytest.approx(1.01)


def _file(tmp_path, rows):
    cpu = {"features": ["avx2"], "torch_isa": "AVX2"}
    header = dict(op="multi_lora_linear", device="A CPU", gpu=None, cpu=cpu, threads=2, commit="c" * 40,
                  date="2026-01-02", versions={"torch": "2.13.0", "peft": "0.21.2"})  # fmt: skip
    (tmp_path / "r.json").write_text(report.json.dumps({"header": header, "rows": rows}))
    return tmp_path / "r.json"


def test_report_uses_this_judge(tmp_path, capsys):
    assert report.main(["--judge", str(_file(tmp_path, [row("peftkern", 13.0)]))]) == 1
    assert "MISSED" in capsys.readouterr().out
    assert report.main(["--judge", str(_file(tmp_path, [row("peftkern", 11.0)]))]) == 0


def test_readme_table(tmp_path):
    reference = dict(adapter_dtype=None, dropout=None)
    decode = dict(M=32, adapters=32, mix="distinct")
    rows = [
        row("base", 2.0, base=2.0, **decode, **reference), row("base_own", 1.8, base=2.0, **decode, **reference),
        row("gather", 40.0, base=2.0, **decode), row("peftkern_bank", 3.0, base=2.0, **decode),
        row("sgmv", 0.9, base=2.0, **decode),
        row("base", 10.0, **reference), row("peftkern", 11.0), row("peft", None, skipped="hopelessly slow"),
        row("peftkern", 12.0, ranks="mixed", base_share=0.5, which="fwd_bwd"),
    ]  # fmt: skip
    _file(tmp_path, rows)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmarks:multi_lora_linear -->\n<!-- /benchmarks:multi_lora_linear -->\n")
    argv = ["--readme", str(readme), "--results", str(tmp_path)]
    assert report.main(argv) == 0 and report.main([*argv, "--check"]) == 0
    text = readme.read_text()
    assert "| 32x4096x4096 | 16 | 32 distinct | 0% | 2.00 | 0.90 | 20.00 | 1.50 | 0.900 | 60% |" in text
    assert "| 512x4096x4096 | 16 | 8 uniform | 0% | 10.00 | too slow to time | 1.10 |" in text
    assert "| 512x4096x4096 | up to 16 | 8 uniform | 50% |" in text
