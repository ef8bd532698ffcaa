"""Measured choices: nearest rows, exact sizes and dtypes, no choice where nothing near was measured, honest tables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from peftkern.dispatch import tuned
from peftkern.problem import Problem
from peftkern.settings import TABLES, Settings

FAKE = "Imaginary GPU X-1 (80 GB)"


def problem(M=8192, N=4096, K=4096, R=16, op="lora_linear_fwd", adapter=torch.float32, flags=("dropout",)):
    return Problem(op, "cuda", "sm_90", torch.bfloat16, adapter, M, N, K, R, frozenset(flags))


def row(M=8192, choice="fused", **changes):
    base = dict(op="lora_linear_fwd", dtype="bf16", adapter_dtype="fp32", dropout=True, M=M, N=4096, K=4096, R=16)
    return base | dict(choice=choice, config=None) | changes


@pytest.fixture
def packaged(tmp_path):
    """``packaged(rows, **settings)``: settings with a table of the device FAKE in force."""

    def write(rows, **settings):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / tuned.file_name(FAKE)).write_text(json.dumps({"schema": 1, "meta": {}, "rows": rows}))
        return Settings(tables=(str(folder),), gpu=FAKE)._replace(**settings)

    return write


def choice(problem, now):
    found = tuned.entry(problem, now)
    return found and found.candidate


def test_file_names():
    assert tuned.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert tuned.slug(FAKE) == "imaginary-gpu-x-1-80-gb"


def test_buckets_are_the_nearest_powers_of_two():
    expected = {1: 1, 2: 2, 3: 4, 5: 4, 6: 8, 11: 8, 12: 16, 4096: 4096, 5792: 4096, 5793: 8192}
    assert {m: tuned.bucket(m) for m in expected} == expected
    for m in range(1, 3000):
        ratios = {2**e: max(m / 2**e, 2**e / m) for e in range(13)}
        assert ratios[tuned.bucket(m)] == min(ratios.values())


def test_without_a_table_there_is_no_choice(tmp_path):
    assert tuned.entry(problem(), Settings(tables=(str(tmp_path),), gpu=FAKE)) is None


def test_the_nearest_row_decides(packaged):
    now = packaged([row(512, "epilogue"), row(2048, "cuda"), row(8192, "fused", config={"block_m": 128})])
    expected = {
        255: "epilogue", 512: "epilogue", 1000: "epilogue", 1100: "cuda", 2048: "cuda", 4000: "cuda", 4200: "fused",
        8192: "fused", 16384: "fused",
    }  # fmt: skip
    assert {m: choice(problem(m), now) for m in expected} == expected
    assert tuned.entry(problem(), now).config == {"block_m": 128}
    assert tuned.entry(problem(2048), now).config is None
    now = packaged([row(0, "cuda", op="lora_row_norm", dropout=False)])
    assert choice(problem(0, op="lora_row_norm", flags=()), now) == "cuda"
    now = packaged([row(512, "epilogue"), row(2048, "cuda"), row(8192, "fused")])
    # More than a factor of two from any row, or no rows at all.
    assert [choice(problem(m), now) for m in (0, 1, 128, 40_000)] == [None] * 4


def test_weights_in_codes_have_rows_of_their_own(packaged):
    """Of their kind; where none is near there is no choice, whatever was measured of a dense weight."""
    now = packaged([row(64, "epilogue"), row(64, "fused", base="nf4")])
    kinds = {kind: choice(problem(64, flags=("dropout", kind)), now) for kind in ("nf4", "fp4", "identity")}
    assert kinds == {"nf4": "fused", "fp4": None, "identity": None} and choice(problem(64), now) == "epilogue"


@pytest.mark.parametrize(
    "other",
    [
        problem(N=4095), problem(K=4112), problem(R=8), problem(op="lora_linear_bwd"), problem(flags=()),
        problem(adapter=torch.bfloat16), problem(flags=("dropout", "base_out_scale")),
        dataclasses.replace(problem(), dtype=torch.float16), dataclasses.replace(problem(), dtype=torch.float64),
    ],
)  # fmt: skip
def test_all_else_must_agree(packaged, other):
    now = packaged([row()])
    assert {choice(problem(flags=f), now) for f in (("dropout",), ("dropout", "bias"))} == {"fused"}
    assert choice(other, now) is None


def test_batch_invariance_knows_no_choice(packaged):
    assert choice(problem(), packaged([row()], batch_invariant=True)) is None


def test_no_choice_for_other_devices(packaged):
    now = packaged([row()])
    assert choice(problem(), now) == "fused" and choice(problem(), now._replace(gpu="Another GPU")) is None
    assert choice(dataclasses.replace(problem(), device="cpu"), now._replace(gpu="")) is None


def test_a_candidate_that_is_named_is_the_fastest(packaged):
    now = packaged([row()])
    assert (
        choice(problem(R=3), now._replace(candidate="cuda"))
        == choice(problem(), now._replace(candidate="cuda"))
        == "cuda"
    )
    assert choice(problem(), now._replace(candidate="none")) is None


@pytest.mark.parametrize(
    "rows, match",
    [([row(choice="magic")], "magic"), ([row(8192), row(8000)], "two rows")],
)
def test_tables_that_make_no_sense(packaged, rows, match):
    with pytest.raises(ValueError, match=match):
        tuned.parse({"schema": 1, "rows": rows}, "x.json")
    with pytest.warns(RuntimeWarning, match=match):  # of a user's own: passed over
        assert tuned.entry(problem(), packaged(rows)) is None
    with pytest.raises(ValueError, match="schema"):
        tuned.parse({"schema": 99, "rows": []}, "x.json")


def test_packaged_tables():
    """Every table of a GPU that is shipped can be read, and names the fastest of what a row allows."""
    for file in set(Path(TABLES).glob("*.json")) - set(Path(TABLES).glob("cpu-*.json")):
        data = json.loads(file.read_text())
        assert file.name == tuned.file_name(data["meta"]["gpu"]["name"])
        assert tuned.parse(data, file.name)
        for r in data["rows"]:
            times = r["us"]
            best = min(r["eligible"], key=times.get)
            assert best.split()[0] == r["choice"], r
            assert "addmm" not in r["eligible"] or times[best] <= times["addmm"], r
