"""multi_lora_linear and sgmv as functions: gradients, ids, autocast, compile, what is saved, bad input."""

from __future__ import annotations

import pytest
import torch

from peftkern import AdapterBank, lora_linear, multi_lora_linear, sgmv
from peftkern.many.route import route
from peftkern.many.table import table_of

K, N = 20, 13
RANKS = (3, 1, 7, 2)


def listed(dtype=torch.float64, grad=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def leaf(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)

    return [(leaf(R, K), leaf(N, R), 0.5 + i) for i, R in enumerate(RANKS)]


def rebuilt(matrices, adapters):
    return [(matrices[2 * i], matrices[2 * i + 1], s) for i, (_, _, s) in enumerate(adapters)]


IDS = torch.tensor([[0, 2, -1, 2, 0], [1, -1, 0, 0, 2]])


DROPS = [0.5, 0.0, 0.25, 0.1]


@pytest.mark.parametrize("base, p", [(True, 0.0), (True, DROPS), (False, 0.0)], ids=["plain", "dropout", "sgmv"])
def test_gradcheck(base, p):
    adapters = listed()
    x = torch.randn(2, 5, K, dtype=torch.float64, requires_grad=True)
    W, bias = torch.randn(N, K, dtype=torch.float64), torch.randn(N, dtype=torch.float64, requires_grad=True)

    def call(x, bias, *matrices):
        if base:
            return multi_lora_linear(
                x, W, rebuilt(matrices, adapters), IDS, bias=bias, dropout_p=p, training=True, seed=3
            )  # fmt: skip
        return sgmv(x, rebuilt(matrices, adapters), IDS) + bias

    assert torch.autograd.gradcheck(call, (x, bias, *(m for a in adapters for m in a[:2])))


@pytest.mark.parametrize("x, bias", [("float32", "float64"), ("bfloat16", "float16"), ("float32", "bfloat16")])
def test_a_bias_is_not_rounded_in_silence(x, bias):
    x, bias = torch.randn(10, K, dtype=getattr(torch, x)), torch.randn(N, dtype=getattr(torch, bias))
    W, adapters = torch.randn(N, K).to(x), listed(torch.float32)
    for call in (
        lambda: multi_lora_linear(x, W, adapters, IDS.flatten(), bias=bias),
        lambda: lora_linear(x, W, *adapters[0][:2], bias=bias),
    ):
        with pytest.raises(TypeError, match="bias has dtype"):
            call()
        with torch.autocast("cpu", torch.bfloat16):
            assert call().dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_training_each_adapter_alone(dtype):
    adapters, W = listed(torch.float32), torch.randn(N, K).to(dtype)
    ids = torch.tensor([0, 2, -1, 2, 0, 1, 0, 2])
    x, dy = torch.randn(8, K).to(dtype).requires_grad_(), torch.randn(8, N).to(dtype)
    multi_lora_linear(x, W, adapters, ids, dropout_p=0.3, training=True, seed=5).backward(dy)
    for slot, (A, B, s) in enumerate(adapters):
        own, a, b = x.detach().clone().requires_grad_(), *(m.detach().clone().requires_grad_() for m in (A, B))
        mine = (ids == slot)[:, None]
        y = lora_linear(own, W, a, b, scaling=s, dropout_p=0.3, training=True, seed=5)
        y.backward(torch.where(mine, dy, torch.zeros_like(dy)))
        close = dict(rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(A.grad, a.grad, **close)
        torch.testing.assert_close(B.grad, b.grad, **close)
        loose = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else close
        torch.testing.assert_close(x.grad[mine[:, 0]], own.grad[mine[:, 0]], **loose)
    assert not adapters[3][0].grad.any() and not adapters[3][1].grad.any(), "no rows, no gradient"


def test_ids_per_row_per_sequence_and_wrong():
    adapters, W = listed(torch.float32, grad=False), torch.randn(N, K)
    x = torch.randn(3, 4, K)
    each = torch.tensor([1, -1, 2], dtype=torch.int32)
    y = multi_lora_linear(x, W, adapters, each)
    assert torch.equal(y, multi_lora_linear(x, W, adapters, each.repeat_interleave(4)))
    assert torch.equal(y, multi_lora_linear(x, W, adapters, each[:, None].expand(3, 4)))
    for ids in (each[:2], torch.zeros(4, dtype=torch.int64), torch.zeros(13, dtype=torch.int64)):
        with pytest.raises(ValueError, match="adapter_ids has shape"):
            multi_lora_linear(x, W, adapters, ids)
    for ids, error in (
        (each.float(), TypeError),
        ([1, -1, 2], TypeError),
        (each + 2, ValueError),
        (each - 1, ValueError),
    ):
        with pytest.raises(error, match="adapter_ids"):
            multi_lora_linear(x, W, adapters, ids)


def test_a_route_is_made_once_per_batch_and_again_after_a_change():
    adapters, W, x = listed(torch.float32, grad=False), torch.randn(N, K), torch.randn(3, K)
    ids = torch.tensor([1, -1, 2])
    first = multi_lora_linear(x, W, adapters, ids)
    state = table_of(adapters, x, x.dtype)
    kept = route(ids, x, state)
    assert all(a is b for a, b in zip(kept, route(ids, x, state)))
    ids[0] = 0
    assert route(ids, x, state)[0] is not kept[0]
    second = multi_lora_linear(x, W, adapters, ids)
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1:], second[1:])


def test_all_base_rows_are_the_base_product():
    x, W = torch.randn(6, K), torch.randn(N, K)
    nothing = torch.empty(0, K), torch.empty(N, 0)
    base = lora_linear(x, W, *nothing)
    poisoned = [(torch.full((4, K), float("nan")), torch.full((N, 4), float("nan")), float("nan"))]
    assert torch.equal(multi_lora_linear(x, W, poisoned, torch.full((6,), -1)), base)


def test_nan_in_other_rows_and_unused_adapters_stays_there():
    adapters, W = listed(torch.float32, grad=False), torch.randn(N, K)
    x, ids = torch.randn(6, K), torch.tensor([0, 1, -1, 0, 1, -1])
    expected = multi_lora_linear(x, W, adapters, ids)
    for i in (1, 2, 3):
        adapters[i] = tuple(torch.full_like(m, float("nan")) for m in adapters[i][:2]) + (1.0,)
    found = multi_lora_linear(x, W, adapters, ids)
    assert torch.equal(found[ids != 1], expected[ids != 1]) and found[ids == 1].isnan().all()


def test_autocast_and_mixed_adapter_dtypes():
    adapters, W = listed(torch.float32), torch.randn(N, K)
    adapters[1] = tuple(m.detach().bfloat16().requires_grad_() for m in adapters[1][:2]) + (1.5,)
    x, ids = torch.randn(4, K, requires_grad=True), torch.tensor([0, 1, 2, -1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = multi_lora_linear(x, W, adapters, ids)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert [a[0].grad.dtype for a in adapters[:2]] == [torch.float32, torch.bfloat16]


def test_compiles_whole():
    adapters, W = listed(torch.float32), torch.randn(N, K)

    def step(x, ids):
        return multi_lora_linear(x, W, adapters, ids).sin()

    x, ids = torch.randn(6, K, requires_grad=True), torch.tensor([0, 1, -1, 2, 2, 0])
    step(x, ids).sum().backward()
    expected = [x.grad.clone(), *(a[0].grad.clone() for a in adapters)]
    x.grad = None
    for A, B, _ in adapters:
        A.grad = B.grad = None
    torch.compile(step, fullgraph=True)(x, ids).sum().backward()
    torch.testing.assert_close([x.grad, *(a[0].grad for a in adapters)], expected)


def test_a_bank_is_for_inference_and_passes_gradients_to_x():
    adapters, W = listed(torch.float32, grad=False), torch.randn(N, K)
    bank = AdapterBank(K, N, max_adapters=4, max_rank=8)
    ids = torch.tensor([bank.add(str(i), *a) for i, a in enumerate(adapters)][:3] + [-1])
    x = torch.randn(4, K, requires_grad=True)
    y = multi_lora_linear(x, W, bank, ids)
    bank.replace("0", torch.full((3, K), float("nan")), torch.full((N, 3), float("nan")))
    bank.add("later", *adapters[0]) if len(bank) < 4 else None
    y.sum().backward()
    other = x.detach().clone().requires_grad_()
    multi_lora_linear(other, W, adapters, ids).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_only_what_is_needed_is_saved():
    adapters, W = listed(torch.float32), torch.randn(N, K)
    for A, _, _ in adapters:
        A.requires_grad_(False)
    x, kept = torch.randn(50, K), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        multi_lora_linear(x, W, adapters, torch.zeros(50, dtype=torch.int64))
    assert not any(t is x or t.shape == x.shape for t in kept), "no lora_A trains, so x is not kept"


def test_refusals():
    adapters, W, x = listed(torch.float32), torch.randn(N, K), torch.randn(2, K)
    ids = torch.tensor([0, 1])
    bad = [
        (dict(adapters=[]), "adapters is empty"), (dict(adapters=adapters[0][0]), "adapters must be"),
        (dict(adapters=[adapters[0][:2]]), r"adapters\[0\] must be"),
        (dict(adapters=[(adapters[0][0][:, 1:], *adapters[0][1:])]), r"adapters\[0\] lora_A"),
        (dict(adapters=[adapters[0], (adapters[1][0], adapters[1][1][1:], 1.0)]), r"adapters\[1\] lora_B"),
        (dict(adapters=[(*adapters[0][:2], None)]), r"adapters\[0\] scaling"),
        (dict(weight=W.double()), "weight"), (dict(weight=W[1:]), "weight"), (dict(x=x[:, 1:]), "x has shape"),
        (dict(weight=W.clone().requires_grad_()), "weight requires grad"), (dict(bias=torch.zeros(N - 1)), "bias"),
        (dict(dropout_p=1.0), "dropout_p"), (dict(dropout_p=[0.1]), "dropout_p has 1"),
        (dict(adapters=AdapterBank(K + 1, N, max_adapters=1, max_rank=1)), "x has shape"),
        (dict(adapters=AdapterBank(K, N, max_adapters=1, max_rank=1, dtype=torch.float64)), "adapters is a bank of"),
    ]  # fmt: skip
    for change, words in bad:
        args = dict(x=x, weight=W, adapters=adapters, adapter_ids=ids) | change
        with pytest.raises((ValueError, TypeError), match=words):
            multi_lora_linear(**args)
    y = multi_lora_linear(x.requires_grad_(), W, adapters, ids)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: multi_lora_linear(x, W, adapters, ids).sum())(x)
