"""Bottleneck adapters of a batch: each row as its adapter alone, every gradient, mixed widths and activations."""

from __future__ import annotations

import pytest
import torch

from peftkern import AdapterBank, Bottleneck, bottleneck_adapter, multi_bottleneck_adapter, multi_lora_linear, reft
from peftkern.activations import ACTIVATIONS
from peftkern.bases.base import Base

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FIELDS = ("down", "up", "down_bias", "up_bias", "scaling", "out_scale")


def adapter(K, N, R, dtype=F64, activation="gelu", trains=True, bare=False):
    """With everything, or without biases and scales."""
    sizes = {"down": (R, K), "up": (N, R), "down_bias": (R,), "up_bias": (N,), "out_scale": (N,), "scaling": (1,)}
    if bare:
        sizes = {name: sizes[name] for name in ("down", "up")}
    parts = {name: torch.randn(size, dtype=F64).to(dtype).requires_grad_(trains) for name, size in sizes.items()}
    return Bottleneck(activation=activation, **{"scaling": 0.7, **parts})


def tensors(adapters):
    found = [getattr(a, name) for a in adapters for name in FIELDS]
    return [t for t in found if isinstance(t, torch.Tensor)]


def one_by_one(h, adapters, ids, residual=None):
    """The rows of each adapter by bottleneck_adapter."""
    rows = []
    for t, i in enumerate(ids.tolist()):
        at = h[t] if residual is None else residual[t]
        if i < 0:
            rows.append(at)
            continue
        a = adapters[i]
        options = {"down_bias": a.down_bias, "up_bias": a.up_bias, "out_scale": a.out_scale, "scaling": a.scaling}
        rows.append(bottleneck_adapter(h[t], a.down, a.up, activation=a.activation, residual=at, **options))
    return torch.stack(rows)


@pytest.fixture(autouse=True, params=["reference", "auto"])
def backend(request, monkeypatch):
    """The definition, and what a user gets."""
    monkeypatch.setenv("PEFTKERN_BACKEND", request.param)
    return request.param


def batch(dtype, K=10, N=10, names=tuple(ACTIVATIONS)):
    h = torch.randn(12, K, dtype=F64).to(dtype).requires_grad_()
    adapters = [adapter(K, N, 1 + 3 * i, dtype, name, bare=i % 3 == 2) for i, name in enumerate(names)]
    ids = torch.tensor(([*range(len(names)), -1, 0, 3, -1] * 2)[:12])[torch.randperm(12)]
    return h, adapters, ids


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_rows_and_gradients_are_those_of_their_adapters(dtype, apart):
    h, adapters, ids = batch(dtype, N=7 if apart else 10)
    residual = torch.randn(12, 7, dtype=dtype, requires_grad=True) if apart else None
    leaves = [h, *tensors(adapters), *[residual] * apart]
    ours = multi_bottleneck_adapter(h, adapters, ids, residual=residual)
    theirs = one_by_one(h, adapters, ids, residual)
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == F64 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(ours, theirs, **tolerance)
    dy = torch.randn_like(ours)
    for mine, other in zip(torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(theirs, leaves, dy)):
        torch.testing.assert_close(mine, other, **tolerance)


def test_gradcheck(backend):
    if backend == "reference":
        h, adapters, ids = batch(F64, names=("gelu", "tanh", "silu", "sigmoid"))
        leaves = tensors(adapters)

        def run(h, *leaves):
            return multi_bottleneck_adapter(h, adapters, ids, dropout_p=0.25, training=True, seed=5)

        assert torch.autograd.gradcheck(run, (h, *leaves))


@pytest.mark.parametrize("what", ["h", "down", "up", "down_bias", "up_bias", "out_scale", "scaling"])
def test_one_gradient_alone(what):
    h, adapters, ids = batch(F32)
    given = [h, *tensors(adapters)]
    every = torch.autograd.grad(multi_bottleneck_adapter(h, adapters, ids).sin().sum(), given)
    for t in given:
        t.requires_grad_(False)
    wanted = [h] if what == "h" else [t for a in adapters if isinstance(t := getattr(a, what), torch.Tensor)]
    for t in wanted:
        t.requires_grad_()
    alone = torch.autograd.grad(multi_bottleneck_adapter(h, adapters, ids).sin().sum(), wanted)
    for t, grad in zip(wanted, alone):
        torch.testing.assert_close(grad, next(e for g, e in zip(given, every) if g is t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision(dtype):
    h, adapters, ids = batch(dtype)
    ours = multi_bottleneck_adapter(h, adapters, ids)
    wide = [
        Bottleneck(activation=a.activation, **{n: t.double() if isinstance(t, torch.Tensor) else t for n in FIELDS
                   if (t := getattr(a, n)) is not None}) for a in adapters
    ]  # fmt: skip
    exact = one_by_one(h.double(), wide, ids)
    alone = one_by_one(h, adapters, ids)
    bound = 1.5 * (alone.double() - exact).abs().max() + exact.abs().max() * torch.finfo(dtype).eps / 2
    assert ours.dtype == dtype and (ours.double() - exact).abs().max() <= bound


def test_a_bank(backend):
    h, adapters, ids = batch(F32)
    h = h.detach()
    bank = AdapterBank(10, 10, max_adapters=8, max_rank=32, dtype=F32)
    for i, each in enumerate(adapters):
        a = each.adapter()
        bank.add(
            str(i), a.lora_A, a.lora_B, a.scaling, bias=a.bias, rank_bias=a.rank_bias, activation=a.activation,
            **a.coefficients,
        )  # fmt: skip
    numbers = bank.ids([None if i < 0 else str(i) for i in ids.tolist()])
    expected = multi_bottleneck_adapter(h, adapters, ids)
    torch.testing.assert_close(multi_bottleneck_adapter(h, bank, numbers), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        multi_bottleneck_adapter(h, bank, numbers), multi_lora_linear(h, Base("identity", ()), bank, numbers)
    )
    # An activation that is replaced by none is forgotten.
    bank.replace("0", adapters[0].down, adapters[0].up)
    plain = [Bottleneck(adapters[0].down, adapters[0].up, activation="identity"), *adapters[1:]]
    expected = multi_bottleneck_adapter(h, plain, ids)
    torch.testing.assert_close(multi_bottleneck_adapter(h, bank, numbers), expected, rtol=1e-5, atol=1e-5)


def test_sequences_and_compiled():
    h = torch.randn(3, 5, 10, requires_grad=True)
    adapters = [adapter(10, 10, 4, F32), adapter(10, 10, 7, F32, "relu")]
    ids = torch.tensor([1, -1, 0])
    step = lambda h: multi_bottleneck_adapter(h, adapters, ids)  # noqa: E731
    y = step(h)
    for b, i in enumerate(ids.tolist()):
        expected = h[b] if i < 0 else one_by_one(h[b], adapters, torch.full((5,), i))
        torch.testing.assert_close(y[b], expected, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(step, backend="aot_eager")
    grads = [torch.autograd.grad(f(h).square().sum(), h)[0] for f in (step, compiled)]
    torch.testing.assert_close(*grads)


def test_a_row_has_the_same_bits_in_any_batch(backend):
    h, adapters, ids = batch(F32)
    order = torch.randperm(12)
    y = multi_bottleneck_adapter(h, adapters, ids)
    again = multi_bottleneck_adapter(h[order], adapters, ids[order])
    torch.testing.assert_close(again, y[order], rtol=1e-6, atol=1e-6)
    if backend == "auto":
        assert torch.equal(again, y[order])


def test_what_does_not_fit():
    h, adapters, ids = batch(F32)
    h = h.detach()
    with pytest.raises(TypeError, match=r"adapters\[0\] must be a Bottleneck"):
        multi_bottleneck_adapter(h, [(adapters[0].down, adapters[0].up, 1.0)], ids)
    with pytest.raises(ValueError, match="activation is 'mish'"):
        multi_bottleneck_adapter(h, [Bottleneck(adapters[0].down, adapters[0].up, activation="mish")], ids)
    with pytest.raises(ValueError, match="rank_bias has shape"):
        multi_bottleneck_adapter(h, [Bottleneck(adapters[0].down, adapters[0].up, torch.zeros(3))], ids * 0)
    with pytest.raises(ValueError, match="up_bias has shape"):
        multi_bottleneck_adapter(h, [Bottleneck(adapters[0].down, adapters[0].up, None, torch.zeros(3))], ids * 0)
    with pytest.raises(ValueError, match="residual has shape"):
        multi_bottleneck_adapter(h, adapters, ids, residual=torch.zeros(12, 9))
    with pytest.raises((ValueError, IndexError), match="no adapter"):
        multi_bottleneck_adapter(h, adapters[:2], ids * 0 + 2)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_reft_of_each_sequence(dtype):
    """Every variant in one batch, each on positions of its own, as ``reft`` alone: outputs and all gradients."""
    T, H, R = 6, 10, 3
    kinds = [("loreft", "identity"), ("noreft", "identity"), ("direft", "silu"), ("nodireft", "relu"),
             ("consreft", "identity"), ("lobireft", "identity")]  # fmt: skip
    h = torch.randn(len(kinds), T, H, dtype=dtype, requires_grad=True)
    parts, adapters = [], []
    for variant, activation in kinds:
        rotate, weight, bias = (torch.randn(*size, dtype=dtype, requires_grad=True) for size in ((R, H), (R, H), (R,)))
        source = weight if variant not in ("consreft", "lobireft") else None
        parts.append((rotate, source, bias))
        adapters.append(Bottleneck.of_reft(rotate, source, bias, variant=variant, activation=activation))
    positions = torch.stack([torch.randperm(T)[:2] for _ in kinds])
    chosen = torch.arange(len(kinds))
    ids = torch.full((len(kinds), T), -1).scatter(1, positions, chosen[:, None].expand_as(positions))
    ours = multi_bottleneck_adapter(h, adapters, ids.flatten())
    alone = torch.cat([
        reft(h[i : i + 1], *parts[i], positions=positions[i : i + 1], variant=variant, activation=activation)
        for i, (variant, activation) in enumerate(kinds)
    ])  # fmt: skip
    leaves, dy = [h, *(t for each in parts for t in each if t is not None)], torch.randn_like(h)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == F32 else {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(ours, alone, **close)
    for grad, expected in zip(
        torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(alone, leaves, dy), strict=True
    ):
        torch.testing.assert_close(grad, expected, **close)


def test_reft_that_is_no_bottleneck():
    R, W, b = torch.randn(2, 5), torch.randn(2, 5), torch.randn(2)
    for arguments, options, message in (
        ((R, W), {"variant": "loft"}, "variant"), ((R,), {}, "a weight"), ((R, W, b), {"variant": "consreft"}, "a bias"),
        ((R,), {"variant": "lobireft"}, "a bias"), ((R, W), {"activation": "relu"}, "activation"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Bottleneck.of_reft(*arguments, **options)
