"""BottleneckAdapter: the modules of the literature, written out in torch's own layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from peftkern import BottleneckAdapter


def trained(*args, **options):
    """A module without a zero in it."""
    module = BottleneckAdapter(*args, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


def plain(m: BottleneckAdapter, h, residual=None):
    """The same module in torch's own steps."""
    z = {"relu": F.relu, "gelu": F.gelu}[m.activation](F.linear(h, m.down, m.down_bias))
    o = F.linear(z, m.up, m.up_bias) * m.scaling
    o = o if m.out_scale is None else o * m.out_scale
    if m.gate is not None:
        o = o * torch.sigmoid(m.gate(h)).mean(dim=1).unsqueeze(-1)
    return o + (h if residual is None else residual)


def same(m, h, *more):
    """Output and every gradient of the module are those of torch's own steps."""
    leaves = (*m.parameters(), h, *more)
    found = []
    for y in (m(h, *more), plain(m, h, *more)):
        found.append((y, torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), leaves)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("scaling", [1.0, 4.0, "learned", "channel"])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_module(scaling, gate, bias):
    m = trained(10, 3, "gelu", scaling, gate=gate, bias=bias, dtype=torch.float64)
    same(m, torch.randn(2, 4, 10, dtype=torch.float64, requires_grad=True))


def test_a_new_module_gives_its_residual():
    h, residual = torch.randn(2, 4, 10), torch.randn(2, 4, 10)
    for options in ({}, {"scaling": "learned"}, {"scaling": "channel"}, {"gate": True}, {"bias": False}):
        m = BottleneckAdapter(10, 3, **options)
        assert torch.equal(m(h), h) and torch.equal(m(h, residual), residual)
        m(h).sum().backward()
        assert m.up.grad.any()


def test_dropout_acts_in_training_alone():
    m = trained(10, 3, dropout=0.5, dropout_on="input")
    h = torch.randn(2, 40, 10)
    assert not torch.equal(m(h), m(h))
    m.eval()
    torch.testing.assert_close(m(h), plain(m, h))


def test_half_precision_with_fp32_parameters():
    m = trained(10, 3, gate=True)
    h = torch.randn(2, 4, 10).bfloat16()
    y = m(h)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain(m, h.float()), rtol=0.01, atol=0.01)


def test_copies_pickles_and_state_dict():
    m = trained(10, 3, scaling="learned", gate=True)
    h = torch.randn(2, 4, 10)
    loaded = BottleneckAdapter(10, 3, scaling="learned", gate=True)
    loaded.load_state_dict(m.state_dict())
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), loaded):
        assert torch.equal(other(h), m(h))
    assert "scaling=learned" in repr(m) and "scaling=channel" in repr(BottleneckAdapter(10, 3, scaling="channel"))


def test_bad_arguments():
    for options, error, match in (
        ({"scaling": "trained"}, ValueError, "scaling is 'trained'"),
        ({"scaling": None}, TypeError, "scaling must be a float"),
        ({"activation": "glu"}, ValueError, "activation is 'glu'"),
        ({"dropout": 1.0}, ValueError, "dropout must be in"),
        ({"dropout_on": "both"}, ValueError, "dropout_on is 'both'"),
    ):
        with pytest.raises(error, match=match):
            BottleneckAdapter(10, 3, **options)
    with pytest.raises(ValueError, match=r"expected \(B, T, K\) for a gate"):
        BottleneckAdapter(10, 3, gate=True)(torch.randn(4, 10))


def test_compiled():
    m, h = trained(10, 3, "gelu", "learned", gate=True), torch.randn(2, 4, 10)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(h).square().sum(), tuple(m.parameters())) for f in (m, compiled)]
    torch.testing.assert_close(*grads)
