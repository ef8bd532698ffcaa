"""verify on row norms: names, problems where W and the branch cancel, wrong results."""

from __future__ import annotations

import pytest
import torch

from peftkern.testing import accuracy
from peftkern.testing.norm_problems import RowNormProblem
from peftkern.verify import main as verify
from peftkern.verify.problem_sets import SETS, set_of

NORM = SETS["lora_row_norm"]
RUN = ["--op", "lora_row_norm", "--problem", "norm:fp32:1", "norm:bf16:2:cancel"]


def test_names():
    names = NORM.names(60, ["fp32", "bf16", "fp16"], 5, special=True)
    assert len(set(names)) == 60 and all(set_of(n) is NORM for n in names)
    assert sum(n.endswith(":cancel") for n in names) == 3
    with pytest.raises(ValueError, match="norm:DTYPE:SEED:cancel"):
        verify.named("norm:fp32:1:large")


def test_every_kind_of_problem_comes_up():
    problems = [verify.named(name) for name in NORM.names(240, ["fp32", "fp16"], 0, special=True)]
    assert {p.cancel for p in problems} == {p.zero_weight for p in problems} == {True, False}
    assert any(p.R == 0 for p in problems) and any(p.R > min(p.N, p.K) for p in problems)
    assert len({(p.layout, p.adapter_layout) for p in problems}) == 9


def test_what_the_branch_leaves_is_rounding():
    t = RowNormProblem(1, 20, 30, 4, torch.float16, torch.float32, scaling=-1.5, cancel=True).tensors()
    left = (t["weight"].double() - 1.5 * (t["lora_B"].double() @ t["lora_A"].double())).norm(dim=1)
    assert (left > 0).all() and (left < 2.0**-10 * t["weight"].double().norm(dim=1)).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_right_passes_and_wrong_fails(backend, monkeypatch):
    target = verify.targets([backend], "panels", "lora_row_norm")[0]
    if target.reason():
        pytest.skip(target.reason())
    run = [*RUN, "--backend", backend]
    assert verify.main(run) == 0
    right = accuracy.run_ours
    monkeypatch.setattr(accuracy, "run_ours", lambda *a: {k: v * 1.00001 for k, v in right(*a).items()})
    assert verify.main(run) == 1
