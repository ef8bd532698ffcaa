"""Weights in codes: the loader against each kind's definition, then every product that reads one."""

from __future__ import annotations

import pytest
import torch

from peftkern import lora_linear, multi_lora_linear
from peftkern.backends.triton.operand import KINDS, weight_of
from peftkern.bases.base import kind_of
from peftkern.kernels import configs
from peftkern.kernels.quantised.panels import times
from peftkern.settings import using
from peftkern.testing.accuracy import check
from peftkern.testing.bases import QUANTISED, random_base
from peftkern.testing.problems import LoRALinearProblem

F16, F32 = torch.float16, torch.float32
READ = [name for name in QUANTISED if name.split()[0] in KINDS]
# A kind of each way to hold codes and scales.
WAYS = ("nf4", "fp4 nested", "int8", "int4", "int4 signed", "hqq4", "quanto4", "fp8 by blocks", "mxfp4", "q4_0", "q8_0")


def sizes(name: str, N: int, K: int) -> tuple[int, int]:
    """N and K as odd as the kind allows."""
    return N, max(QUANTISED[name][1], K - K % QUANTISED[name][1])


def assert_accurate(problem):
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("shape", [(7, 45), (67, 165), (130, 192)], ids=str)
def test_panels_are_the_definition(name, shape, monkeypatch):
    """A product with the unit matrix, by panels of either side of W, and more than one of them: W to the bit."""
    N, K = sizes(name, *shape)
    base = random_base(name, N, K, torch.Generator().manual_seed(N + K))
    W = kind_of(base.kind).dequantise(base.tensors, F32, (N, K))
    weight = weight_of(base.kind, base.tensors, N, K)
    monkeypatch.setattr(configs, "panel_columns", lambda C, itemsize: 128)
    assert torch.equal(times(torch.eye(N), weight.t(), 0), W)
    assert torch.equal(times(torch.eye(K), weight, 0), W.t())
    assert torch.equal(times(torch.eye(K, dtype=F16), weight, 0), W.half().t())


def test_a_scale_of_mxfp4_that_is_not_a_number():
    blocks, scales = random_base("mxfp4", 40, 96, torch.Generator().manual_seed(0)).tensors
    scales[7, 1] = 255
    weight = weight_of("mxfp4", (blocks, scales), 40, 96)
    assert times(torch.ones(3, 96), weight, 0).isnan().all(0).nonzero().flatten().tolist() == [7]
    assert times(torch.ones(3, 40), weight.t(), 0).isnan().all(0).nonzero().flatten().tolist() == [*range(32, 64)]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("M", [5, 70], ids=["decoded", "panels"])
def test_forward_and_gradients(name, M):
    N, K = sizes(name, 45, 101)
    for dtype in (F32, F16):
        options = ("bias", "base_in_scale") if dtype == F32 else ("bias",)
        assert_accurate(LoRALinearProblem(3, M, K, N, 5, dtype, F32, 0.7, 0.2, options, base=name))


def test_batch_invariance_decodes_every_row_alike():
    problem = LoRALinearProblem(4, 70, 96, 40, 5, F32, F32, base="nf4")
    t = {k: v for k, v in problem.tensors().items() if k != "dy"}
    with using(batch_invariant=True):
        whole = problem.ours(t)
        assert torch.equal(problem.ours(t | {"x": t["x"][:64]}), whole[:64])
    assert_accurate(problem)


@pytest.mark.parametrize("name", READ)
def test_row_norm(name):
    N, K = sizes(name, 40, 151)
    g = torch.Generator().manual_seed(6)
    base = random_base(name, N, K, g)
    A, B = torch.randn(3, K, generator=g), torch.randn(N, 3, generator=g)
    W = kind_of(base.kind).dequantise(base.tensors, torch.float64, (N, K))
    norm = torch.ops.peftkern.lora_row_norm(list(base.tensors), base.kind, A, B, 0.5)
    exact = (W + 0.5 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("M", [6, 70], ids=["decoded", "panels"])
def test_many_adapters(M):
    """Base product and dx under a branch of several adapters, against the same call on the decoded weight."""
    N, K = 45, 101
    g = torch.Generator().manual_seed(7)
    base = random_base("nf4 nested", N, K, g)
    W = kind_of(base.kind).dequantise(base.tensors, F32, (N, K))
    adapters = [(torch.randn(4, K, generator=g), torch.randn(N, 4, generator=g), 0.7) for _ in range(2)]
    ids = torch.arange(M) % 3 - 1
    x, dy = torch.randn(M, K, generator=g), torch.randn(M, N, generator=g)

    def both(weight):
        leaf = x.clone().requires_grad_()
        y = multi_lora_linear(leaf, weight, adapters, ids)
        return y.detach(), *torch.autograd.grad(y, leaf, dy)

    for ours, expected in zip(both(base), both(W), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_no_codes_are_left_to_the_reference():
    base = random_base("int8", 3, 0, torch.Generator())
    A, B = torch.randn(2, 0), torch.randn(3, 2)
    with pytest.raises(RuntimeError, match="of which there are none"):
        lora_linear(torch.randn(4, 0), base, A, B)
