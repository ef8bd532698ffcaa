"""The functions for the residual stream against the modules of AdapterHub's ``adapters``, in fp64: outputs, every gradient."""

from __future__ import annotations

import adapters
import pytest
import torch
from adapters.methods import modeling
from adapters.methods.reft import ReftUnit
from torch import nn

from peftkern import bottleneck_adapter, reft
from peftkern.nn import compositions

F64, H = torch.float64, 32
CONFIGS = {
    "seq_bn": adapters.SeqBnConfig(),
    "double_seq_bn": adapters.DoubleSeqBnConfig(),
    "par_bn": adapters.ParBnConfig(),
    "scaled_par_bn": adapters.ParBnConfig(scaling="learned"),
    "adapterplus": adapters.AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0),
    "a gate, as in unipelt": adapters.SeqBnConfig(use_gating=True, reduction_factor=4),
    **{
        f"with {f}": adapters.SeqBnConfig(non_linearity=f, reduction_factor=4)
        for f in ("gelu", "swish", "tanh", "leakyrelu")
    },
    "with dropout": adapters.SeqBnConfig(dropout=0.3, reduction_factor=4),
}


def randomised(module):
    """The module in fp64 with values that are no zeros, in training."""
    for p in module.double().parameters():
        nn.init.normal_(p, std=0.4)
    return module.train()


def same(theirs, ours, leaves, rtol=1e-11):
    """Outputs and the gradients of all leaves are equal up to rounding."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    dy = torch.randn_like(theirs)
    pairs = [torch.autograd.grad(y, leaves, dy, allow_unused=True) for y in (theirs, ours)]
    seen = 0
    for leaf, expected, found in zip(leaves, *pairs):
        expected, found = (leaf.new_zeros(leaf.shape) if g is None else g for g in (expected, found))
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
        seen += bool(expected.any())
    assert seen > 1


@pytest.mark.parametrize("name", CONFIGS)
def test_bottleneck(name, shared_mask):
    config = CONFIGS[name]
    cls = modeling.ParallelAdapter if config["is_parallel"] else modeling.Adapter
    module = randomised(cls("a", H, H // int(config["reduction_factor"]), config))
    x, residual = (torch.randn(2, 5, H, dtype=F64, requires_grad=True) for _ in range(2))
    theirs = module(x, residual)[0]
    down, up = next(m for m in module.adapter_down.modules() if isinstance(m, nn.Linear)), module.adapter_up
    scaling, options = module.scaling, {}
    if isinstance(scaling, torch.Tensor) and scaling.numel() > 1:
        scaling, options["out_scale"] = 1.0, scaling
    if config["use_gating"]:
        options["gate"] = torch.sigmoid(module.gate(x)).mean(1)[:, :, None]
    # A parallel adapter's residual is added by the layer around it.
    ours = bottleneck_adapter(
        x, down.weight, up.weight, down_bias=down.bias, up_bias=up.bias, activation=config["non_linearity"],
        scaling=scaling, residual=torch.zeros_like(x) if config["is_parallel"] else residual,
        dropout_p=config["dropout"], training=True, seed=shared_mask, **options,
    )  # fmt: skip
    same(theirs, ours, [x, residual, *module.parameters()])


@pytest.mark.parametrize("orthogonal, subtract, variant", [
    (True, True, "loreft"), (False, True, "noreft"), (True, False, "direft"), (False, False, "nodireft"),
])  # fmt: skip
def test_reft(orthogonal, subtract, variant, shared_mask):
    unit = ReftUnit(H, 4, orthogonal, subtract, "relu", dropout=0.3)
    if not orthogonal:
        randomised(unit)
    unit.double().train()
    x = torch.randn(3, 6, H, dtype=F64, requires_grad=True)
    positions = torch.tensor([[0, 5, 2], [1, -1, 4], [-1, -1, 3]])
    rows = [(b, t) for b, each in enumerate(positions.tolist()) for t in each]
    # The library gathers the rows, all of them real ones: the others stay as they are.
    picked = torch.stack([x[b, max(t, 0)] for b, t in rows]).view(3, 3, H)
    edited = unit(picked)
    theirs = torch.stack(list(x.unbind(0)))
    for i, (b, t) in enumerate(rows):
        if t >= 0:
            at = torch.zeros(3, 6, 1, dtype=torch.bool)
            at[b, t] = True
            theirs = torch.where(at, edited[b, i % 3], theirs)
    source = unit.learned_source
    ours = reft(
        x, unit.projection.weight, source.weight, source.bias, positions=positions, variant=variant, activation="relu",
        dropout_p=0.3, training=True, seed=shared_mask,
    )  # fmt: skip
    same(theirs, ours, [x, *unit.parameters()])


@pytest.mark.parametrize(
    "config", [adapters.CompacterConfig(), adapters.CompacterPlusPlusConfig()], ids=["compacter", "plus"]
)
def test_compacter(config):
    config = config.replace(shared_phm_rule=False)
    layers = [randomised(modeling.PHMLayer("a", *size, "down", config)) for size in ((H, 8), (8, H))]
    x = torch.randn(3, H, dtype=F64, requires_grad=True)
    theirs = x + layers[1](nn.functional.gelu(layers[0](x)))
    down, up = (
        compositions.phm_weight((layer.phm_rule_left, layer.phm_rule_right) if layer.factorized_phm_rule else layer.phm_rule,
                                (layer.W_left, layer.W_right))
        for layer in layers
    )  # fmt: skip
    ours = bottleneck_adapter(x, down, up, down_bias=layers[0].b, up_bias=layers[1].b, activation="gelu")
    same(theirs, ours, [x, *(p for layer in layers for p in layer.parameters())])


def test_invertible():
    block = randomised(modeling.NICECouplingBlock([[H]], non_linearity="relu", reduction_factor=2))
    ours = compositions.Invertible(H, 2, dtype=F64)
    for mine, other in ((ours.F, block.F), (ours.G, block.G)):
        down, up = (m for m in other.modules() if isinstance(m, nn.Linear))
        tensors = (down.weight, down.bias, up.weight, up.bias)
        for name, value in zip(("down", "down_bias", "up", "up_bias"), tensors):
            setattr(mine, name, value)
    x = torch.randn(2, 5, H, dtype=F64, requires_grad=True)
    same(block(x), ours(x), [x, *block.parameters()])
    same(block(x, rev=True), ours(x, inverse=True), [x, *block.parameters()])
