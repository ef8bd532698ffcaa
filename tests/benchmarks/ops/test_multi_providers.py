"""Every provider with many adapters computes the same function, branches alone included."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util

import pytest
import torch

from peftkern.bases.base import base_of, kind_of
from peftkern.benchmarks.core.case import BASE, COPY, FP32_BASE, OWN_BASE, PASSES, Case
from peftkern.benchmarks.ops import multi_lora_linear
from peftkern.benchmarks.peers import many
from peftkern.benchmarks.peers.many_data import copies, make_data

CASE = Case("multi_lora_linear", "cpu", torch.float32, torch.float32, 12, 40, 24, 8, 0.0, 3, "zipf", 0.25, "same",
            "training")  # fmt: skip
# Without those that force a back end (test_candidates.py) and those that are Triton (test_peer_kernels.py).
NAMES = [
    n for n, p in multi_lora_linear.PROVIDERS.items()
    if n not in (BASE, FP32_BASE, COPY) and not n.startswith((OWN_BASE, "padded")) and p.around is contextlib.nullcontext
]  # fmt: skip
BENCH = multi_lora_linear.BENCH
DTYPES = [
    (torch.float32, torch.float32, 1e-5),
    (torch.bfloat16, torch.float32, 3e-2),
    (torch.bfloat16, torch.bfloat16, 3e-2),
]
CHANGES = [
    dict(),
    dict(ranks="mixed"),
    dict(mix="identical", base_share=0.0),
    dict(mix="identical", adapters=1, base_share=0.0),
    dict(mix="distinct", adapters=12, base_share=0.0),
    dict(base_share=1.0),
]


def _build(name, case, copies=1):
    if name == "peft":
        pytest.importorskip("peft")
    provider = multi_lora_linear.PROVIDERS[name]
    if provider.missing():
        pytest.skip(provider.missing())
    if name == "polylora":
        case = dataclasses.replace(case, phase="decode")
    if reason := provider.unusable(case):
        pytest.skip(reason)
    data = make_data(case, copies)
    step = provider.build(case, data)
    return data.over("nf4") if name.endswith("_nf4") else data, step


def _weight(data, i=0):
    """The frozen weight in fp64."""
    base = base_of(data.weight[i % len(data.weight)])
    return kind_of(base.kind).dequantise(base.tensors, torch.float64, (data.case.N, data.case.K))


def _exact(case, data, i=0, branch=False):
    """y in fp64, row by row, and its leaves: x and the matrices of the adapters that have rows."""
    adapters = [(A.detach().double().requires_grad_(), B.detach().double().requires_grad_(), s)
                for A, B, s in data.lists(case.adapter_dtype)[i]]  # fmt: skip
    x, weight = data.x[i % len(data.x)].detach().double().requires_grad_(), _weight(data, i)
    rows = []
    for t, a in enumerate(data.ids.tolist()):
        y = x[t] @ weight.T * (not branch)
        if a >= 0:
            A, B, s = adapters[a]
            y = y + s * (x[t] @ A.T) @ B.T
        rows.append(y)
    return torch.stack(rows), x, adapters


def _close(mine, exact, tol):
    assert (mine.double() - exact).norm() <= tol * max(exact.norm(), 1e-30)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("dtype, adapter, tol", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_same_numbers(name, dtype, adapter, tol, changes):
    case = dataclasses.replace(CASE, dtype=dtype, adapter_dtype=adapter, **changes)
    data, step = _build(name, case)
    y = step.forward(0)
    exact = _exact(case, data, branch=multi_lora_linear.PROVIDERS[name].floor is not None)[0]
    assert y.dtype == dtype and y.shape == exact.shape
    _close(y.detach(), exact.detach(), tol)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("name", [n for n in NAMES if PASSES[1] in multi_lora_linear.PROVIDERS[n].passes])
def test_same_gradients(name, changes):
    case = dataclasses.replace(CASE, **changes)
    data, step = _build(name, case)
    grads = torch.autograd.grad(step.forward(0), step.leaves[0], step.dy[0], allow_unused=case.base_share == 1.0)
    y, x, adapters = _exact(case, data)
    flat = [t for A, B, _ in adapters for t in (A, B)]
    expected = torch.autograd.grad(y, [x, *flat], data.dy[0].double(), materialize_grads=True)
    _close(grads[0], expected[0], 1e-5)
    if name == "peftkern":
        for mine, exact in zip(grads[1:], expected[1:], strict=True):
            _close(mine, exact, 1e-5)
    elif case.base_share < 1.0:
        # A loop makes gradients for adapters with rows alone, a stack makes one for all of them, padding included.
        _close(sum(g.double().square().sum() for g in grads[1:]), sum(g.square().sum() for g in expected[1:]), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_copy_has_its_own_adapters(name):
    case = dataclasses.replace(CASE, phase="decode")
    data, step = _build(name, case, copies=3)
    branch = multi_lora_linear.PROVIDERS[name].floor is not None
    for i in range(3):
        y = step.forward(i)
        assert not y.requires_grad
        _close(y, _exact(case, data, i, branch)[0].detach(), 1e-5)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", [OWN_BASE, f"{OWN_BASE}_nf4"])
def test_own_base_product(name, dtype, tol):
    data, step = _build(name, dataclasses.replace(CASE, dtype=dtype))
    y = step.forward(0)
    x, weight = data.x[0].detach().double(), _weight(data)
    _close(y.detach(), x @ weight.T, tol)
    (dx,) = torch.autograd.grad(y, step.leaves[0], step.dy[0])
    _close(dx, data.dy[0].double() @ weight, tol)


@pytest.mark.parametrize("way", ["cuda", "triton"])
@pytest.mark.parametrize("kind", multi_lora_linear.CODED)
def test_base_products_over_codes_on_a_gpu(kind, way):
    """Planned for rows of many adapters, held to what the codes stand for, and judged by the bytes of these."""
    name = f"{OWN_BASE}_{kind}_{way}"
    provider = multi_lora_linear.PROVIDERS[name]
    case = dataclasses.replace(CASE, phase="decode")
    assert multi_lora_linear.check(provider, case) is None
    dense = dataclasses.replace(provider, build=multi_lora_linear.PROVIDERS[OWN_BASE].build)
    assert "computes something else" in multi_lora_linear.check(dense, case)
    gpu = dataclasses.replace(case, device="cuda", mix="distinct", base_share=0.0)
    assert name in multi_lora_linear.plan(gpu, "gpu")
    assert name not in multi_lora_linear.plan(dataclasses.replace(gpu, phase="training"), "gpu")
    large = dataclasses.replace(gpu, M=64, K=4096, N=4096, dtype=torch.bfloat16)
    dense_bytes, bytes_ = (BENCH.floor_of(n, large, "fwd").base_bytes for n in (OWN_BASE, name))
    assert bytes_ == pytest.approx(dense_bytes - (2 - {"nf4": 0.5625, "int8": 1}[kind]) * 2**24)


@pytest.mark.parametrize("name", ["loop", "grouped_mm", "peftkern"])
def test_dropout_acts(name):
    plain, dropped = (_build(name, dataclasses.replace(CASE, dropout=p))[1].forward(0) for p in (0.0, 0.5))
    assert (plain - dropped).abs().max() > 1e-3


def test_what_only_serves_has_no_graph_in_training():
    serving = ["gather", "peft", "peftkern_bank", "sgmv", "sgmv_list"]
    for name in [*serving, "polylora"] if importlib.util.find_spec("polylora") else serving:
        assert not _build(name, CASE)[1].forward(0).requires_grad
    assert _build("peftkern", CASE)[1].forward(0).requires_grad


def test_copies_exceed_the_cache():
    case = dataclasses.replace(CASE, M=32, K=4096, N=4096, R=16, adapters=32, mix="distinct", base_share=0.0,
                               dtype=torch.bfloat16, adapter_dtype=torch.bfloat16, phase="decode")  # fmt: skip
    each = 32 * 16 * 8192 * 2
    assert copies(case, 32 << 20) == -(-(64 << 20) // each)
    assert copies(dataclasses.replace(case, mix="identical"), 32 << 20) == 64
    assert copies(dataclasses.replace(case, M=512, adapters=512), 32 << 20) == 1
    assert copies(dataclasses.replace(case, phase="training"), 32 << 20) == 1
    assert copies(dataclasses.replace(case, K=64), 32 << 20) == 1


def test_missing_grouped_mm_is_said(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("not on this CPU\nmore")

    monkeypatch.setattr(many.F, "grouped_mm", broken, raising=False)
    assert "does not run on CPU here: not on this CPU" in many.no_grouped_mm()
    monkeypatch.delattr(many.F, "grouped_mm")
    assert "has no torch.nn.functional.grouped_mm" in many.no_grouped_mm()
