"""Entries of the registry without a layer: the functions against their equations in torch's own steps, without a library."""

from __future__ import annotations

import pytest
import torch

from peftkern.methods import STREAM
from peftkern.methods.residual.stream import register
from peftkern.testing.residual import EXAMPLES

F64, H, R = torch.float64, 20, 4
# The gate of a sequence is in no plain form.
FORMS = [
    (name, form) for name, forms in EXAMPLES.items() for form in forms if form != "unipelt" and "dropout" not in form
]


@pytest.mark.parametrize("name, form", FORMS)
def test_outputs_and_gradients(name, form):
    example = EXAMPLES[name][form]
    module = example.plain(H, R, F64)
    h = torch.randn(2, 9, H, dtype=F64, requires_grad=True)
    residual = torch.randn_like(h, requires_grad=True) if example.residual else h
    leaves = [h, *([residual] if example.residual else []), *(p for p in module.parameters() if p.requires_grad)]
    answers = [compute(module, h, residual) for compute in (example.stock, example.ours)]
    torch.testing.assert_close(*answers, rtol=1e-11, atol=1e-11)
    assert not torch.equal(answers[0], residual)
    dy = torch.randn_like(h)
    gradients = [torch.autograd.grad(y, leaves, dy, allow_unused=True) for y in answers]
    for one, other, leaf in zip(*gradients, leaves, strict=True):
        one, other = (leaf.new_zeros(()) if g is None else g for g in (one, other))
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="there is a LoReFT already"):
        register(STREAM["LoReFT"])
