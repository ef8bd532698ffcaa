"""The functions for the residual stream against the modules of AdapterHub's ``adapters`` and of pyreft, in fp64: outputs, every
gradient."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from adapters.methods import modeling
from adapters.methods.reft import ReftUnit
from torch import nn

from peftkern import reft
from peftkern.methods import STREAM
from peftkern.nn import compositions
from peftkern.testing.residual import EXAMPLES, randomised

F64, H, R = torch.float64, 32, 4


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


@pytest.mark.parametrize("name, form", [(name, form) for name, forms in EXAMPLES.items() for form in forms])
def test_every_form_of_every_entry(name, form, shared_mask):
    example = EXAMPLES[name][form]
    module = example.make(H, R, F64).train()
    h = torch.randn(2, 9, H, dtype=F64, requires_grad=True)
    residual = torch.randn_like(h, requires_grad=True) if example.residual else h
    theirs, ours = example.stock(module, h, residual), example.ours(module, h, residual, seed=shared_mask)
    trained = [p for p in module.parameters() if p.requires_grad]
    same(theirs, ours, [h, *([residual] if example.residual else []), *trained])


def test_every_entry_has_forms_of_the_libraries_that_it_names():
    assert EXAMPLES.keys() == STREAM.keys()
    for name, entry in STREAM.items():
        assert {example.library for example in EXAMPLES[name].values()} == set(entry.tested), name
        for library, (oldest, newest) in entry.tested.items():
            here = tuple(map(int, importlib.metadata.version(library).split(".")[:2]))
            assert oldest <= here <= newest, f"{name}: {library} {here}"


@pytest.mark.parametrize("orthogonal, subtract, variant", [
    (True, True, "loreft"), (False, True, "noreft"), (True, False, "direft"), (False, False, "nodireft"),
])  # fmt: skip
def test_reft(orthogonal, subtract, variant, shared_mask):
    unit = randomised(ReftUnit(H, 4, orthogonal, subtract, "relu", dropout=0.3)).double().train()
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


def test_invertible():
    block = randomised(modeling.NICECouplingBlock([[H]], non_linearity="relu", reduction_factor=2)).double()
    ours = compositions.Invertible(H, 2, dtype=F64)
    for mine, other in ((ours.F, block.F), (ours.G, block.G)):
        down, up = (m for m in other.modules() if isinstance(m, nn.Linear))
        tensors = (down.weight, down.bias, up.weight, up.bias)
        for name, value in zip(("down", "down_bias", "up", "up_bias"), tensors):
            setattr(mine, name, value)
    x = torch.randn(2, 5, H, dtype=F64, requires_grad=True)
    same(block(x), ours(x), [x, *block.parameters()])
    same(block(x, rev=True), ours(x, inverse=True), [x, *block.parameters()])
