"""verify on problems with many adapters: names, special kinds, and back ends without kernels."""

from __future__ import annotations

import json

import pytest
import torch

from peftkern.testing import accuracy, multi_problems
from peftkern.verify import main as verify
from peftkern.verify.problem_sets import SETS, set_of

MULTI = SETS["multi_lora_linear"]
RUN = ["--op", "multi_lora_linear", "--backend", "reference"]


@pytest.fixture
def small(monkeypatch):
    """Problems that take milliseconds."""
    whole = multi_problems.random_multi_problem
    limits = dict(max_M=40, max_KN=60, max_R=12, max_adapters=4)
    monkeypatch.setattr(
        multi_problems, "random_multi_problem", lambda seed, dtype, **kw: whole(seed, dtype, **(kw | limits))
    )


def test_three_problems(small, tmp_path, capsys):
    file = tmp_path / "v.json"
    assert verify.main([*RUN, "--problems", "3", "--json", str(file)]) == 0
    assert "3 problems (0 of special kinds)" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert {r["problem"] for r in written["rows"]} == {"multi:fp32:0", "multi:bf16:1", "multi:fp16:2"}
    assert all(r["ok"] and r["ratio"] <= 1 for r in written["rows"])


def test_a_failure_is_repeated_from_its_line(small, monkeypatch, capsys):
    right = accuracy.run_ours
    monkeypatch.setattr(accuracy, "run_ours", lambda *a: {k: v * 1.5 for k, v in right(*a).items()})
    assert verify.main([*RUN, "--problems", "1", "--dtype", "fp32", "--seed", "8"]) == 1
    out = capsys.readouterr().out
    line = next(part for part in out.split("again: ")[1:])
    argv = line.split("\n")[0].split()
    assert argv[:2] == ["peftkern", "verify"] and "multi:fp32:8" in argv
    monkeypatch.setattr(accuracy, "run_ours", right)
    assert verify.main(argv[2:]) == 0


def test_gradients_of_all_adapters_share_a_column(small, capsys):
    assert verify.main([*RUN, "--problem", "multi:fp32:1", "multi:fp32:3"]) == 0
    header = capsys.readouterr().out.partition("worst error")[2].split("reference")[0]
    assert "dA" in header and "dA0" not in header


def test_names_are_unambiguous():
    assert set_of("fp32:3").op == "lora_linear" and set_of("multi:fp32:3").op == "multi_lora_linear"
    names = MULTI.names(300, ["fp32", "bf16", "fp16"], 5, special=True)
    assert len(set(names)) == 300 and all(set_of(n) is MULTI for n in names)
    for kind in MULTI.kinds:
        assert sum(n.endswith(f":{kind}") for n in names) == 6
    assert {MULTI.parse(n)[1] for n in names} == set(range(5, 305))
    single = SETS["lora_linear"].names(300, ["fp32", "bf16", "fp16"], 5, special=True)
    assert not set(single) & set(names)


@pytest.mark.parametrize(
    "name", ["multi:fp32", "multi:fp32:1:large", "multi:fp32:x", "multi:bf8:1", "multi:fp32:1:2:3"]
)
def test_bad_names(name, capsys):
    with pytest.raises(ValueError, match="multi:DTYPE:SEED:segment"):
        verify.named(name)
    with pytest.raises(SystemExit):
        verify.main([*RUN, "--problem", name])
    assert name in capsys.readouterr().err


def test_a_name_of_another_op_says_so(capsys):
    with pytest.raises(SystemExit):
        verify.main(["--problem", "multi:fp32:1"])
    assert "--op multi_lora_linear" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        verify.main([*RUN, "--problem", "fp32:1"])


def test_special_kinds():
    for seed in range(40):
        segment = verify.named(f"multi:fp32:{seed}:segment")
        assert segment.M == 10_000 and segment.ids().unique().numel() == 1 and segment.ids()[0] >= 0
        rows = verify.named(f"multi:bf16:{seed}:rows")
        assert rows.M == 65_600 and (rows.ids() >= 0).any() and rows.dtype == torch.bfloat16
        assert (verify.named(f"multi:fp16:{seed}:base").ids() == -1).all()
        wide = verify.named(f"multi:fp32:{seed}:wide")
        assert wide.ranks == (512, 1) and wide.M >= 64
        assert len(wide.scalings) == len(wide.dropout_p) == 2


def test_random_problems_have_lists_banks_and_branches():
    problems = [verify.named(name) for name in MULTI.names(120, ["fp32", "fp16"], 0, special=True)]
    for field in ("bank", "branch"):
        assert {getattr(p, field) for p in problems} == {True, False}
    assert max(max(p.ranks) for p in problems) == 512
    assert any(p.mix == "base" for p in problems) and any(p.M == 65_600 for p in problems)


def test_the_interpreter_gets_small_problems(monkeypatch):
    triton = verify.targets(["triton"], None)[0]
    args = verify.parser().parse_args(["--op", "multi_lora_linear", "--problems", "20"])
    names = verify.chosen(args, triton)
    assert all(MULTI.fits_interpreter(name) for name in names) and len(names) == 6
    assert {MULTI.parse(n)[2] for n in names} == {"", "base"}
    args = verify.parser().parse_args([
        "--op", "multi_lora_linear", "--problem", "multi:fp32:1:rows", "multi:bf16:2", "multi:fp16:3:base"
    ])  # fmt: skip
    assert verify.chosen(args, triton) == ["multi:fp16:3:base"]
    assert verify.problem_of(triton, "multi:fp16:3:base").K <= 160
    with pytest.raises(ValueError, match="interpreted"):
        verify.named("multi:fp32:1:rows", **MULTI.limits)


def test_a_back_end_without_kernels_is_named_and_left_out(small, monkeypatch, capsys):
    import types

    from peftkern.dispatch import choose

    empty = types.SimpleNamespace(OPS={"multi_lora_linear_fwd": None}, unavailable=lambda now: None)
    monkeypatch.setattr(choose, "load", lambda name: empty)
    for target in verify.targets(["cpu"], None, "multi_lora_linear"):
        assert "has no kernel for multi_lora_linear_route" in target.reason()
    assert verify.main(["--op", "multi_lora_linear", "--problems", "1", "--backend", "all"]) == 0
    assert "not usable: has no kernel for multi_lora_linear_route" in capsys.readouterr().out
    assert verify.main(["--op", "multi_lora_linear", "--problems", "1", "--backend", "cpu"]) == 1
