"""docs/performance.md: every figure is read from a result or marked as a calculation, and the calculations are right."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftkern.benchmarks import report
from peftkern.benchmarks.core.case import Case
from peftkern.benchmarks.core.floor import layer_floor
from peftkern.benchmarks.ops import lora_linear
from peftkern.benchmarks.tables import model, performance

pytestmark = pytest.mark.skipif(not report.PERFORMANCE.exists(), reason="an installed package has no docs")
# What a measurement looks like: a decimal number, or a number with a unit.
FIGURE = re.compile(
    r"\d+\.\d+|\b\d+ ?(?:%|[mµun]s\b|seconds?\b|[KMGT]i?B\b|[GT]B/s|[GT]FLOP|[x×](?![\w])|times\b|percent\b)", re.I
)
PROVENANCE = (
    "*A calculation from sizes and data-sheet rates, not a measurement.*",
    "*Limits, and calculations from sizes and data-sheet rates; not measurements.*",
)


def parts():
    return {m[2]: m[0] for m in report.MARKERS.finditer(report.PERFORMANCE.read_text())}


def typed(text):
    """Figures that stand outside of the generated parts."""
    return FIGURE.findall(report.MARKERS.sub("", text))


def test_no_figure_was_typed():
    assert typed(report.PERFORMANCE.read_text()) == []


@pytest.mark.parametrize(
    "text", ["takes 12 us", "1.05 of it", "70 % of", "70% of", "2x faster", "3.35 TB/s", "in 5 ms"]
)
def test_a_typed_figure_is_found(text):
    assert typed(f"words\n{text} words\n<!-- benchmarks:x -->\n1.5\n<!-- /benchmarks:x -->\n")


@pytest.mark.parametrize(
    "text", ["2 M K N", "sm_90", "64 columns", "56 M N + 48 M K bytes", "16 ranks", "sm_80 to sm_89"]
)
def test_formulas_and_names_are_no_figures(text):
    assert not typed(text)


def test_every_part_is_known_and_says_what_it_is():
    found = parts()
    assert {name for name in found if name.startswith("calculated:")} == {
        f"calculated:{n}" for n in performance.CALCULATED
    }
    assert {f"benchmarks:{n}" for n in report.VIEWS} <= set(found)
    for name, text in found.items():
        lines = text.splitlines()
        if name.startswith("calculated:"):
            assert lines[1] in PROVENANCE, name
        else:
            assert lines[1].startswith("**") or text.split("\n", 1)[1].startswith(report.NOTHING), name


def test_measured_parts_follow_the_results():
    results = report.load()
    for name in ("benchmarks:missed_lora_linear", "benchmarks:missed_multi_lora_linear"):
        assert report.part(name, results) in parts()[name]
        changed = copy.deepcopy(results)
        for row in (row for result in changed for row in result["rows"]):
            for field in ("ratio_to_base", "ratio_to_fp32_base", "ratio_to_best_base"):
                if row.get(field):
                    row[field] *= 1.5
        assert report.part(name, changed) != report.part(name, results)


def test_without_results_a_part_says_so():
    assert report.part("benchmarks:missed_lora_linear", []) == report.NOTHING
    cpu = [r for r in report.load() if not report.on_gpu(r)]
    assert report.part("benchmarks:ways_lora_linear", cpu) == report.NOTHING


def test_parts_of_a_step_by_hand():
    M, K, N = 8192, 4096, 14336
    forward, backward = model.forward(M, K, N), model.backward(M, K, N)
    h100 = model.CHIPS[0]
    assert forward[0].seconds(h100) == pytest.approx(2 * 8192 * 4096 * 14336 / 700e12)
    # Three products of bf16 terms, 16 deep each, behind 4096.
    assert forward[1].seconds(h100) / forward[0].seconds(h100) == pytest.approx(48 / 4096)
    assert model.forward(M, K, N, adapter=2)[1].flops == pytest.approx(2 * M * N * 32)
    assert model.forward(M, K, N, 17)[1].flops == pytest.approx(2 * M * N * 96)
    assert forward[2].alone(h100) == pytest.approx(2 * M * K / 3.35e12) and forward[2].seconds(h100) == 0
    assert [p.seconds(h100) for p in backward[2:4]] == pytest.approx([2 * M * N / 3.35e12, 2 * M * K / 3.35e12])
    assert model.total(forward, h100) == pytest.approx(sum(p.seconds(h100) for p in forward[:2]))


def test_passes_are_cut_as_the_kernels_cut_them():
    # 16 or 56 strips of 256 columns; 43 ranges of at least 192 rows.
    assert model.ranges_that_fill(16, 43, 132) == 8 and model.ranges_that_fill(56, 43, 132) == 7
    assert model.shares(8192, 4096, 16, down=True) == 8 * 16 * (4096 * 8 + 16 * 8192)
    assert model.shares(8192, 4096, 16, down=False) == 8 * 16 * 4096 * 15
    assert model.shares(64, 256, 16, down=True) == 0


def test_decoding_by_hand():
    base, adapters, rows = model.decode(64, 4096, 4096, 64)
    assert adapters.bytes == 64 * 16 * (4096 + 4096) * 2 and rows.bytes == 2 * 64 * (4096 + 2 * 4096)
    assert base.bytes == 2 * (4096 * 4096 + 2 * 64 * 4096)
    assert model.decode(64, 4096, 4096, 64, adapter=4)[1].bytes == 2 * adapters.bytes


def test_a_bottleneck_by_hand():
    M, H, R = model.BOTTLENECK
    h200, whole = model.CHIPS[1], M * H * 2 / 4.8e12
    first, second = model.bottleneck_forward(M, H, R, adapter=2)
    assert first.seconds(h200) == pytest.approx(whole + 2 * R * H / 4.8e12)
    assert second.seconds(h200) == pytest.approx(2 * whole + (4 * M * R + 2 * R * H) / 4.8e12)
    # Three products of bf16 terms take longer than their bytes.
    assert model.bottleneck_forward(M, H, R)[0].seconds(h200) == pytest.approx(2 * M * H * 3 * R / 700e12)
    assert model.bottleneck_backward(M, H, R)[3].seconds(model.A100) == pytest.approx(2 * M * H * 3 * R / 220e12)
    moved = sum(p.bytes for p in model.bottleneck_backward(M, H, R, adapter=2))
    assert moved == 10 * M * H + 5 * 4 * M * R + 2 * 2 * R * H


def test_what_is_left_for_the_product():
    M, K, N = model.SHAPES[1]
    base, added = 2 * M * K * N / 700e12, 2 * M * 48 * (N + K) / 700e12 + 2 * M * (N + K) / 4.8e12
    over = (2 * base + added) / (2 * base)
    text = performance.limits()
    assert f"{over:.3f} |\n" in text and f"{2.08 - over:.3f} |\n" in text
    theirs = 2 * base + (56 * M * N + 48 * M * K) / 4.8e12
    assert f"{theirs / (2 * base + added):.2f} |\n" in text


def test_calculated_floors_are_those_of_the_benchmark():
    floor = layer_floor(model.case(8192, 4096, 4096), "fwd_bwd")
    text = performance.floors()
    assert f"{(floor.base_flops + floor.branch_flops) / 700e12 * 1e3:.3f}" in text
    assert f"{(floor.base_bytes + floor.branch_bytes) / 4.8e12 * 1e3:.3f}" in text


def _gpu_result():
    common = dict(op="lora_linear", device="cuda", dtype="bf16", M=8192, K=4096, N=4096, R=16, skipped=None)
    rows = []
    for provider, ms in (("base", 0.5), ("peftkern", 0.6), ("peftkern_cuda", None)):
        row = common | dict(provider=provider, median_ms=ms, ratio_to_base=ms and ms / 0.5)
        row |= dict(adapter_dtype=None, dropout=None) if provider == "base" else dict(adapter_dtype="fp32", dropout=0.1)
        rows += [row | {"pass": which} for which in ("fwd", "fwd_bwd")]
    cpu = dict(features=[], torch_isa="AVX2")
    header = dict(op="lora_linear", device="A GPU", gpu={"arch": "sm_90"}, cpu=cpu, threads=2, commit="c" * 40,
                  date="2026-01-02", versions={"torch": "2.13.0", "peft": "0.21.2"})  # fmt: skip
    return {"header": header, "rows": rows}


def test_ways_of_a_gpu():
    text = report.part("benchmarks:ways_lora_linear", [*report.load(), _gpu_result()])
    assert "**A GPU** (sm_90)" in text and "EPYC" not in text
    assert "| base | 0.500 ms | 0.500 ms |  |  |" in text and "| peftkern | 1.200 | 1.200 |  |  |" in text
    assert "| peftkern_cuda |  |  |  |  |" in text


class _Bytes(TorchDispatchMode):
    """Adds up what operations read and write, those apart that only look at a tensor in another way."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if (
            not {t.data_ptr() for t in made} <= {t.data_ptr() for t in read}
            or function.__name__.split(".")[0][-1] == "_"
        ):
            self.total += sum(t.numel() * t.element_size() for t in read + made)
        return out


def test_bytes_of_peft_are_counted_on_its_operations():
    pytest.importorskip("peft")

    def count(M, K, N, dropout):
        case = Case("lora_linear", "cpu", torch.bfloat16, torch.float32, M, K, N, 1, dropout)
        data = lora_linear.make_data(case, 1)
        step = lora_linear.PROVIDERS["peft"].build(case, data)
        with _Bytes() as bytes_:
            y = step.forward(0)
            torch.autograd.grad(y, step.leaves[0], step.dy[0])
        # The two base products, and the adapters in the four others.
        return bytes_.total - 4 * (M * K + K * N + M * N) - 12 * (K + N)

    M, K, N = 24, 40, 56
    per_N = (count(M, K, 2 * N, 0.1) - count(M, K, N, 0.1)) / (M * N)
    assert per_N == pytest.approx(sum(model.EAGER_MN.values()), abs=0.1)
    # Dropout is several operations on a CPU and one on a GPU; without it the rest is the same.
    per_K = (count(M, 2 * K, N, 0.0) - count(M, K, N, 0.0)) / (M * K)
    dropped = model.EAGER_MK["dropout and its mask"] + model.EAGER_MK["backward: dropout"]
    assert per_K == pytest.approx(sum(model.EAGER_MK.values()) - dropped, abs=0.1)
