"""Methods that are one or several bottlenecks as they are, each against its paper's formula in torch's own steps, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from peftkern import BottleneckAdapter, bottleneck_adapter
from peftkern.nn.compositions import attention, prefix_attention

F64, H, R = torch.float64, 10, 3
FFN = nn.Sequential(nn.Linear(H, 14), nn.GELU(), nn.Linear(14, H)).double().requires_grad_(False)
NORM = nn.LayerNorm(H).double().requires_grad_(False)
LINEAR = nn.Linear(H, 6).double().requires_grad_(False)


def leaf(*shape):
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def trained(*args, **options) -> BottleneckAdapter:
    """An adapter without a zero in it."""
    m = BottleneckAdapter(*(args or (H, R)), dtype=F64, **options)
    for p in m.parameters():
        nn.init.normal_(p)
    return m


def branch(m, h, f=F.relu):
    """What an adapter adds, in torch's own steps."""
    return F.linear(f(F.linear(h, m.down, m.down_bias)), m.up, m.up_bias)


def same(ours, theirs, leaves):
    """Values and all gradients are equal, and no gradient is zero."""
    found = []
    for y in (ours, theirs):
        weights = torch.arange(y.numel(), dtype=F64).view_as(y).cos()
        found.append((y, torch.autograd.grad((y * weights).sum(), leaves, retain_graph=True)))
    torch.testing.assert_close(*found)
    assert all(g.any() for g in found[0][1])


# Of an adapter m, s what a sub-layer gives, i its input: (method, ours, the paper's).
PLACES = {
    "Houlsby": (lambda m, s, i: NORM(m(s) + i), lambda m, s, i: NORM(s + branch(m, s) + i)),
    "Pfeiffer": (
        lambda m, s, i: NORM(m(NORM(s + i), residual=s) + i),
        lambda m, s, i: NORM(s + branch(m, NORM(s + i)) + i),
    ),
    "a norm of its own before": (lambda m, s, i: m(NORM(s), residual=s) + i, lambda m, s, i: s + branch(m, NORM(s)) + i),
    "a norm of its own after": (lambda m, s, i: NORM(m(s)) + i, lambda m, s, i: NORM(branch(m, s) + s) + i),
    "parallel": (lambda m, s, i: NORM(m(i, residual=s) + i), lambda m, s, i: NORM(s + branch(m, i) + i)),
    "AdaptFormer": (
        lambda m, s, i: m(i, residual=FFN(NORM(i)) + s),
        lambda m, s, i: FFN(NORM(i)) + branch(m, i) + s,
    ),
    "LLM-Adapters, before": (lambda m, s, i: LINEAR(m(s)) + i[..., :6], lambda m, s, i: LINEAR(s + branch(m, s)) + i[..., :6]),
}  # fmt: skip


@pytest.mark.parametrize("method", PLACES)
def test_places(method):
    m, s, i = trained(), leaf(2, 5, H), leaf(2, 5, H)
    ours, papers = PLACES[method]
    same(ours(m, s, i), papers(m, s, i), (s, i, *m.parameters()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_llm_adapters_after_and_beside_a_linear(activation, bias):
    f, x = {"tanh": torch.tanh, "identity": lambda v: v}[activation], leaf(2, 5, H)
    beside, after = (trained(k, R, activation=activation, bias=bias, out=6) for k in (H, 6))
    z = LINEAR(x)
    same(beside(x, residual=z), z + branch(beside, x, f), (x, *beside.parameters()))
    same(after(z), z + branch(after, z, f), (x, *after.parameters()))


@pytest.mark.parametrize("scaling", [4.0, "learned"])
def test_scaled_parallel(scaling):
    m, h = trained(scaling=scaling), leaf(2, 5, H)
    same(m(h, residual=FFN(h)), FFN(h) + m.scaling * branch(m, h), (h, *m.parameters()))


def test_adapterplus_with_stochastic_depth():
    """Rows of a batch that leave the adapter out: a gate of 0, others 1 / (1 - p)."""
    m, h, s = trained(scaling="channel"), leaf(3, 5, H), leaf(3, 5, H)
    keep = torch.tensor([1.0, 0.0, 1.0], dtype=F64).view(3, 1, 1) / 0.7
    options = dict(down_bias=m.down_bias, up_bias=m.up_bias, out_scale=m.out_scale, gate=keep, residual=s)
    ours = bottleneck_adapter(h, m.down, m.up, **options)
    same(ours, s + keep * (m.out_scale * branch(m, h)), (h, s, *m.parameters()))
    assert torch.equal(ours[1], s[1])


def test_adapterdrop():
    """Layers below the first adapter keep nothing for backward, and their inputs get no gradient."""
    layers, kept = [FFN] * 4, []
    adapters = [None, None, trained(), trained()]
    x = torch.randn(2, 5, H, dtype=F64)

    def run(adapted):
        h = x
        for layer, m in zip(layers, adapters):
            h = h + layer(h)
            h = h if m is None else adapted(m, h)
        return h

    leaves = [p for m in adapters if m for p in m.parameters()]
    same(run(lambda m, h: m(h)), run(lambda m, h: h + branch(m, h)), leaves)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        h = x + FFN(x)
    assert not kept and not h.requires_grad


def test_mam():
    """A prefix before the keys and a scaled parallel adapter beside the feed-forward part."""
    m, x, prefix = trained(scaling=4.0), leaf(2, 5, H), (leaf(2, 4, 5), leaf(2, 4, 5))

    def heads(t):
        return t.view(2, 5, 2, 5).transpose(1, 2)

    def joined(t):
        return t.transpose(1, 2).reshape(2, 5, H)

    found = []
    for ours in (True, False):
        q = k = v = heads(x)
        if ours:
            a = NORM(x + joined(prefix_attention(q, k, v, prefix)))
            found.append(m(a, residual=FFN(a)))
        else:
            keys, values = (torch.cat([p.expand(2, *p.shape), t], 2) for p, t in zip(prefix, (k, v)))
            a = NORM(x + joined(F.scaled_dot_product_attention(q, keys, values)))
            found.append(FFN(a) + 4.0 * branch(m, a))
    same(*found, (x, *prefix, *m.parameters()))


def test_unipelt():
    """A gated adapter, LoRA with a gate of each sequence, and a gated prefix: each gate the mean of a sigmoid."""
    m, lora = trained(gate=True), trained(activation="identity", bias=False, gate=True)
    x, prefix, to_gate = leaf(2, 5, H), (leaf(1, 4, H), leaf(1, 4, H)), leaf(1, H)
    query = nn.Linear(H, H).double().requires_grad_(False)

    def gate(linear, h):
        return torch.sigmoid(linear(h)).mean(1, keepdim=True)

    share = torch.sigmoid(F.linear(x, to_gate)).mean(1).view(2, 1, 1, 1)
    gated = tuple(share * p for p in prefix)
    k = v = x.unsqueeze(1)
    q = lora(x, residual=query(x)).unsqueeze(1)
    a = x + prefix_attention(q, k, v, gated).squeeze(1)
    ours = m(a)
    q = (query(x) + gate(lora.gate, x) * branch(lora, x, lambda t: t)).unsqueeze(1)
    keys, values = (torch.cat([p, t], 2) for p, t in zip(gated, (k, v)))
    a = x + F.scaled_dot_product_attention(q, keys, values).squeeze(1)
    theirs = a + gate(m.gate, a) * branch(m, a)
    same(ours, theirs, (x, *prefix, to_gate, *m.parameters(), *lora.parameters()))


def test_adamix():
    """One down and one up projection of several are drawn for each step; afterwards one adapter of their means serves."""
    experts, h = [trained() for _ in range(4)], leaf(2, 5, H)
    torch.manual_seed(3)
    for _ in range(3):
        d, u = (experts[i] for i in torch.randint(4, (2,)).tolist())
        ours = bottleneck_adapter(h, d.down, u.up, down_bias=d.down_bias, up_bias=u.up_bias)
        theirs = h + F.linear(F.relu(F.linear(h, d.down, d.down_bias)), u.up, u.up_bias)
        same(ours, theirs, (h, d.down, d.down_bias, u.up, u.up_bias))
    merged = BottleneckAdapter(H, R, dtype=F64)
    merged.load_state_dict({n: sum(e.state_dict()[n] for e in experts) / 4 for n in merged.state_dict()})
    means = [torch.stack([getattr(e, n) for e in experts]).mean(0) for n in ("down", "down_bias", "up", "up_bias")]
    torch.testing.assert_close(merged(h), h + F.linear(F.relu(F.linear(h, *means[:2])), *means[2:]))


class Masked(nn.Module):
    """A pruned matrix: zero where ``mask`` is."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, matrix):
        return matrix * self.mask


def test_sparse_adapter():
    """Matrices pruned before training, as parametrisations of the module: what is cut away stays so."""
    m, h = trained(), leaf(2, 5, H)
    masks = {n: (torch.rand_like(getattr(m, n)) > 0.5).double() for n in ("down", "up")}
    whole = {n: getattr(m, n) for n in masks}
    for name, mask in masks.items():
        parametrize.register_parametrization(m, name, Masked(mask))
    down, up = (whole[n] * masks[n] for n in masks)
    theirs = h + F.linear(F.relu(F.linear(h, down, m.down_bias)), up, m.up_bias)
    same(m(h), theirs, (h, *m.parameters()))
    grads = torch.autograd.grad(m(h).square().sum(), [p.original for p in m.parametrizations.values()])
    assert all(not g[mask == 0].any() for g, mask in zip(grads, masks.values()))


def test_propetl():
    """One prototype that layers share, each through a binary mask whose scores train by a straight-through estimate."""
    prototype, scores = {"down": leaf(R, H), "up": leaf(H, R)}, [(leaf(R, H), leaf(H, R)) for _ in range(2)]

    def masked(name, score):
        return prototype[name] * ((score > 0).double() + score - score.detach())

    ours = theirs = x = leaf(2, 5, H)
    for score in scores:
        down, up = (masked(n, s) for n, s in zip(prototype, score))
        ours = bottleneck_adapter(ours, down, up)
        theirs = theirs + F.relu(theirs @ down.t()) @ up.t()
    same(ours, theirs, (x, *prototype.values(), *(s for pair in scores for s in pair)))


def test_llama_adapter():
    """A second softmax, over a prompt of keys and values alone, enters by a gate."""
    q, k, v, prompt, gate = (
        leaf(2, 3, 5, 4),
        leaf(2, 3, 5, 4),
        leaf(2, 3, 5, 4),
        (leaf(3, 6, 4), leaf(3, 6, 4)),
        leaf(1),
    )
    ours = F.scaled_dot_product_attention(q, k, v, is_causal=True) + gate * attention(q, *prompt)[0]
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    shares = torch.softmax((q @ k.mT / 2).masked_fill(~mask, -torch.inf), -1)
    theirs = shares @ v + gate * (torch.softmax(q @ prompt[0].mT / 2, -1) @ prompt[1])
    same(ours, theirs, (q, k, v, *prompt, gate))
