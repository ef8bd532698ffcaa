"""Compositions against the formulas of their papers, in torch's own steps: values and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peftkern import BottleneckAdapter, bottleneck_adapter
from peftkern.nn.compositions import Invertible, adapter_fusion, merged, phm_weight, prefix_attention
from peftkern.nn.compositions.fusion import FusionWeights

F64 = torch.float64


def leaf(*shape):
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def same(ours, theirs, leaves):
    """Values and gradients are equal."""
    found = []
    for y in (ours, theirs):
        found.append(
            (y, torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), leaves, retain_graph=True))
        )
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("hidden, reduction", [(12, 2), (13, 3), (2, 1)])
def test_invertible(hidden, reduction):
    m = Invertible(hidden, reduction, dtype=F64)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_()
    x, half = leaf(2, 5, hidden), hidden // 2

    def net(a, h):
        return F.linear(F.relu(F.linear(h, a.down, a.down_bias)), a.up, a.up_bias)

    first = x[..., :half] + net(m.F, x[..., half:])
    same(m(x), torch.cat([first, x[..., half:] + net(m.G, first)], -1), (x, *m.parameters()))
    torch.testing.assert_close(m(m(x), inverse=True), x)
    torch.testing.assert_close(m(m(x, inverse=True)), x)
    assert m.F.bottleneck == (hidden - half) // reduction
    with pytest.raises(ValueError, match="reduction is 7, expected 1 to half of hidden = 12"):
        Invertible(12, 7)


@pytest.mark.parametrize("factored", [False, True])
def test_compacter(factored):
    n, K, R = 4, 12, 8
    rule = (leaf(n, n, 1), leaf(n, 1, n)) if factored else leaf(n, n, n)
    down = (leaf(n, K // n, 1), leaf(n, 1, R // n)) if factored else leaf(n, K // n, R // n)
    up = (leaf(n, R // n, 1), leaf(n, 1, K // n)) if factored else leaf(n, R // n, K // n)
    leaves = [rule, down, up] if not factored else [*rule, *down, *up]

    def matrix(W):
        left, right = (torch.bmm(*f) if factored else f for f in (rule, W))
        return sum(torch.kron(a, b) for a, b in zip(left, right))

    h, bias = leaf(2, 5, K), leaf(R)
    y = bottleneck_adapter(h, phm_weight(rule, down), phm_weight(rule, up), down_bias=bias, activation="gelu")
    same(y, h + F.gelu(h @ matrix(down) + bias) @ matrix(up), (h, bias, *leaves))


def test_bad_phm_factors():
    with pytest.raises(ValueError, match=r"rule and W have shapes \(3, 3, 3\) and \(4, 2, 2\)"):
        phm_weight(torch.randn(3, 3, 3), torch.randn(4, 2, 2))


@pytest.mark.parametrize(
    "projected", [(), ("query", "query_bias"), ("key", "key_bias", "value"), FusionWeights._fields]
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_fusion_of_adapters(projected, dropout_p):
    H, A = 6, 3
    weights = FusionWeights(**{n: leaf(*([H] if n.endswith("bias") else [H, H])) for n in projected})
    h, residual = leaf(2, 5, H), leaf(2, 5, H)
    adapters = [BottleneckAdapter(H, 2, dtype=F64) for _ in range(A)]
    for adapter in adapters:
        nn.init.normal_(adapter.up)
    outputs = torch.stack([adapter(h) for adapter in adapters], -2)
    options = dict(temperature=1.7, dropout_p=dropout_p, training=True)
    torch.manual_seed(3)
    ours = adapter_fusion(h, outputs, residual, weights, **options)
    q = h if weights.query is None else F.linear(h, weights.query, weights.query_bias)
    k = outputs if weights.key is None else F.linear(outputs, weights.key, weights.key_bias)
    v = outputs if weights.value is None else F.linear(outputs, weights.value)
    torch.manual_seed(3)
    shares = torch.softmax(F.dropout(torch.einsum("bth,btah->bta", q, k), dropout_p) / 1.7, -1)
    theirs = torch.einsum("bta,btah->bth", shares, v) + residual
    leaves = (h, residual, *(w for w in weights if w is not None), *(a.up for a in adapters))
    same(ours, theirs, leaves)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("P", [0, 1, 4])
def test_prefix_is_concatenation(is_causal, shared, P):
    B, heads, T, D = 2, 3, 5, 4
    q, k, v = (leaf(B, heads, T, D) for _ in range(3))
    prefix = tuple(leaf(heads, P, D) if shared else leaf(B, heads, P, D) for _ in range(2))
    keys, values = (torch.cat([p.expand(B, heads, P, D), s], 2) for p, s in zip(prefix, (k, v)))
    mask = torch.ones(T, P + T, dtype=torch.bool).tril(P) if is_causal else None
    expected = F.scaled_dot_product_attention(q, keys, values, mask)
    same(prefix_attention(q, k, v, prefix, is_causal), expected, (q, k, v, *prefix))


def test_merging_nothing_changes_nothing():
    o, lse = torch.randn(3, 4), torch.randn(3)
    y, both = merged(o, lse, torch.zeros(3, 4), torch.full((3,), -torch.inf))
    assert torch.equal(y, o) and torch.equal(both, lse)
