"""Several adapters in a call: the library composes, each of them runs fused where its output alone is read."""

from __future__ import annotations

import adapters
import pytest
import torch
from adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack
from adapters.methods import modeling

import peftkern

from .models import LAYERS, LENGTH, adapted, batch, outcome, same

SEQ = ("double_seq_bn", "double_seq_bn[reduction_factor=4,non_linearity='gelu']", "seq_bn[reduction_factor=8]")
# Setup -> calls of adapters in each layer.
SETUPS = {
    "stack": (Stack("a", "b"), 4),
    "stack of three": (Stack("a", "c", "b"), 5),
    "batch split": (BatchSplit("a", "b", batch_sizes=[1, 2]), 4),
    "split": (Split("a", "b", splits=[4, LENGTH - 4]), 4),
    "parallel": (Parallel("a", "b"), 4),
    "average": (Average("a", "b", weights=[0.3, 0.7]), 4),
}  # fmt: skip


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def composed(setup, *configs):
    model = adapted("bert", *configs)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapters." in name:
                p.normal_(std=0.3)
    model.train_adapter(setup)
    return model


@pytest.mark.parametrize("setup, calls", SETUPS.values(), ids=SETUPS)
def test_compositions(setup, calls):
    model = composed(setup, *SEQ)
    same(model, batch())
    status = peftkern.status(model)
    assert (status.fused, status.stock) == (calls * LAYERS, 0)


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("setup", ["batch split", "parallel", "split", "average"])
def test_beside_one_that_is_declined(setup, which):
    model = composed(SETUPS[setup][0], *SEQ)
    for name, module in model.named_modules():
        if isinstance(module, modeling.Adapter) and name.endswith(f".{which}"):
            module.adapter_up.register_forward_hook(lambda m, i, o: None)
    report = same(model, batch())
    status = peftkern.status(model)
    assert set(report.skipped.values()) == {"up carries a hook"} and status.fused == status.stock == 2 * LAYERS


def test_fusion_reads_what_adapters_add():
    model = adapted("bert", *SEQ[:2])
    setup = Fuse("a", "b")
    model.add_adapter_fusion(setup)
    model.train_adapter_fusion(setup)
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        torch.nn.init.normal_(p, std=0.3)
    model.eval()  # its temperature changes at each call in training
    inputs = batch()
    expected = outcome(model, inputs)
    peftkern.accelerate(model)
    torch.testing.assert_close(outcome(model, inputs), expected, rtol=0, atol=0)
    status = peftkern.status(model, reset=True)
    assert status.fused == 0 and set(status.reasons.values()) == {"AdapterFusion reads what it adds"}
    model.set_active_adapters("a")
    model(**inputs)
    assert peftkern.status(model).stock == 0


@pytest.mark.parametrize("setup, fused", [(Stack("a", "b"), 0), (Stack("b", "a"), 0), (Stack("a", "c"), 2)])
def test_a_parallel_adapter_is_fused_alone(setup, fused):
    """Beside others of its layer its branch alone is read. c has no module where a has one."""
    attention = adapters.BnConfig(mh_adapter=True, output_adapter=False, reduction_factor=4, non_linearity="relu")
    model = composed(setup, "par_bn", "par_bn[reduction_factor=4]", attention)
    same(model, batch())
    status = peftkern.status(model)
    assert (status.fused, status.stock) == (fused * LAYERS, 0 if fused else 2 * LAYERS)
    if not fused:
        assert all("not the only adapter" in reason for reason in status.reasons.values())


def test_gating_scores_are_told():
    for config in ("seq_bn[use_gating=True]", "par_bn[use_gating=True]"):
        model, inputs, scores = adapted("bert", config, train=False), batch(), []
        for _ in range(2):
            scores.append(model(**inputs, output_adapter_gating_scores=True)["adapter_gating_scores"])
            peftkern.accelerate(model)
        assert peftkern.status(model).fused == LAYERS
        for theirs, ours in zip(*(s["a"].values() for s in scores)):
            for key in theirs:
                torch.testing.assert_close(*map(torch.tensor, (ours[key], theirs[key])), rtol=1e-10, atol=0)
