"""The weight of a module under torch's orthogonal parametrisation, made by ours."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from peftkern.nn import orthogonal

F64 = torch.float64


def linear(**options):
    module = parametrizations.orthogonal(nn.Linear(9, 3, bias=False, dtype=F64), **options)
    made = module.parametrizations.weight
    with torch.no_grad():
        made.original += torch.randn(3, 9, dtype=F64).triu(1)
        made.original[1, 1] = -made.original[1, 1]
    return module, made


@pytest.mark.parametrize("trivial", [True, False])
@pytest.mark.parametrize("diagonal", [1.0, 0.99, 2.5, 0.0])
def test_it_is_torchs(trivial, diagonal):
    """Signs too, which torch rounds to integers: weight decay makes rows zero there."""
    module, made = linear(orthogonal_map="householder", use_trivialization=trivial)
    with torch.no_grad():
        made.original.diagonal()[0] = -diagonal
        made.original.diagonal()[2] = diagonal
    found = []
    for Q in (module.weight, orthogonal.parametrised(module)):
        found.append((Q, *torch.autograd.grad((Q * torch.arange(27).view(3, 9).cos()).sum(), made.original)))
    torch.testing.assert_close(*found)
    assert found[0][0].any() == found[1][0].any()


def test_other_weights_are_torchs_own(monkeypatch):
    monkeypatch.setattr(orthogonal, "orthonormal", lambda *_: pytest.fail("made by ours"))
    twice, _ = linear()
    parametrize.register_parametrization(twice, "weight", nn.ReLU())
    plain = nn.Linear(4, 3)
    modules = [linear(orthogonal_map="matrix_exp")[0], linear(orthogonal_map="cayley")[0], twice]
    modules.append(parametrizations.spectral_norm(nn.Linear(4, 3)))
    for module in (m.eval() for m in modules):
        assert torch.equal(orthogonal.parametrised(module), module.weight)
    assert orthogonal.parametrised(plain) is plain.weight


def test_it_is_kept_while_nothing_changes():
    module, made = linear()
    with torch.no_grad():
        first = orthogonal.parametrised(module)
        assert orthogonal.parametrised(module) is first
        base = made[0].base
        base.copy_(nn.init.orthogonal_(torch.empty_like(base)))
        torch.testing.assert_close(orthogonal.parametrised(module), module.weight)
        made.original.mul_(torch.rand_like(made.original).triu(1) + torch.eye(3, 9))
        torch.testing.assert_close(orthogonal.parametrised(module), module.weight)
        module.float()
        torch.testing.assert_close(orthogonal.parametrised(module), module.weight)
    assert orthogonal.parametrised(module).requires_grad
    parametrize.remove_parametrizations(module, "weight")
    assert orthogonal.parametrised(module) is module.weight
