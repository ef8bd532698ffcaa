"""verify on weights in codes: every kind comes up, right results pass and wrong ones fail."""

from __future__ import annotations

import pytest

from peftkern.testing import accuracy
from peftkern.testing.bases import QUANTISED
from peftkern.verify import main as verify
from peftkern.verify.problem_sets import SETS

CODED = [s for s in SETS.values() if s.codes]


def test_which_ops_have_them():
    assert [s.op for s in CODED] == ["lora_linear", "multi_lora_linear", "lora_row_norm"]
    with pytest.raises(ValueError, match="rotate:DTYPE:SEED"):
        verify.named("rotate:fp32:1:codes")


@pytest.mark.parametrize("problems", CODED, ids=lambda s: s.op)
def test_every_kind_comes_up(problems):
    names = problems.names(648, ["fp32", "bf16", "fp16"], 0, special=True)
    coded = [name for name in names if name.endswith(":codes")]
    assert len(coded) == 648 // 12 and not any(
        name.endswith(":codes") for name in problems.names(300, ["fp32"], 0, special=False)
    )
    made = [problems.make(name) for name in coded]
    assert {p.base for p in made} == set(QUANTISED)
    assert all(p.K % QUANTISED[p.base][1] == 0 and not getattr(p, "branch", False) for p in made)
    assert problems.make(coded[3]) == made[3]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("problems", CODED, ids=lambda s: s.op)
def test_right_passes_and_wrong_fails(problems, backend, monkeypatch):
    target = verify.targets([backend], "panels", problems.op)[0]
    if target.reason():
        pytest.skip(target.reason())
    names = [f"{problems.prefix}{dtype}:{seed}:codes" for dtype, seed in (("fp32", 3), ("bf16", 4), ("fp16", 9))]
    run = ["--op", problems.op, "--backend", backend, "--problem", *names]
    assert verify.main(run) == 0
    right = accuracy.run_ours
    monkeypatch.setattr(accuracy, "run_ours", lambda *a: {k: v * 1.01 for k, v in right(*a).items()})
    assert verify.main(run) == 1
