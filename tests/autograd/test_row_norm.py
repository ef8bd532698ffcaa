"""row_norm: a constant of the graph, under autograd, autocast and a compiler."""

from __future__ import annotations

import pytest
import torch

from peftkern.autograd.row_norm import row_norm
from peftkern.bases.base import base_of

BF16, F32 = torch.bfloat16, torch.float32


def operands(dtype=F32, adapter=F32):
    g = torch.Generator().manual_seed(5)
    W, A, B = (torch.randn(*shape, generator=g) for shape in ((6, 10), (3, 10), (6, 3)))
    return W.to(dtype), A.to(adapter).requires_grad_(), B.to(adapter).requires_grad_()


def expected(W, A, B, scaling):
    return (W.double() + scaling * (B.double() @ A.double())).norm(dim=1).detach()


@pytest.mark.parametrize("dtype, adapter", [(F32, F32), (BF16, F32), (BF16, BF16), (torch.float64, torch.float64)])
def test_a_constant_in_the_accumulator_dtype(dtype, adapter):
    W, A, B = operands(dtype, adapter)
    got = row_norm(W, A, B, -0.5)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else F32)
    assert not got.requires_grad and got.grad_fn is None
    torch.testing.assert_close(got.double(), expected(W, A, B, -0.5), rtol=1e-6, atol=0)
    # A weight that trains, a base, an int.
    assert torch.equal(row_norm(W.clone().requires_grad_(), A, B, -0.5), got)
    assert torch.equal(row_norm(base_of(W), A, B, -0.5), got)
    assert torch.equal(row_norm(W, A, B, 1), row_norm(W, A, B))


@pytest.mark.parametrize("adapter", [F32, BF16])
def test_scaling_in_a_tensor(adapter):
    """Never read by the host: a meta tensor has no value to read."""
    W, A, B = operands(BF16, adapter)
    for scaling in (
        torch.tensor(-0.75),
        torch.tensor([-0.75], dtype=torch.float64),
        torch.tensor([[-0.75]], dtype=BF16),
    ):
        got = row_norm(W, A, B, scaling.requires_grad_())
        assert not got.requires_grad and got.dtype == F32
        torch.testing.assert_close(got, row_norm(W, A, B, -0.75))
    assert row_norm(*(t.to("meta") for t in (W, A, B, torch.ones(1)))).shape == (6,)
    for bad, error in (
        (torch.ones(2), ValueError),
        (torch.tensor(1), TypeError),
        (torch.ones(1, device="meta"), ValueError),
    ):
        with pytest.raises(error, match="scaling"):
            row_norm(W, A, B, bad)


def test_what_is_multiplied_by_it_trains():
    W, A, B = operands()
    (B.sum() / row_norm(W, A, B, 2.0)).sum().backward()
    assert A.grad is None
    torch.testing.assert_close(B.grad.double(), (1 / expected(W, A, B, 2.0)).sum().expand_as(B))


def test_changes_in_place_are_seen():
    W, A, B = operands()
    row_norm(W, A, B)
    for t in (W, A, B):
        t.data.mul_(1.5)
        torch.testing.assert_close(row_norm(W, A, B).double(), expected(W, A, B, 1.0), rtol=1e-6, atol=0)


def test_autocast_changes_no_norm():
    W, A, B = operands()
    plain = row_norm(W, A, B)
    with torch.autocast("cpu", BF16):
        assert torch.equal(row_norm(W, A, B), plain)
        half = A.to(BF16), B.to(BF16)
        assert torch.equal(row_norm(W, *half), row_norm(W, *(t.float() for t in half)))
    with pytest.raises(TypeError, match="lora_A"):
        row_norm(W, *half)


def test_compiled():
    W, A, B = operands(BF16)

    def layer(x, W, A, B):
        return (x @ B) * (1 / row_norm(W, A, B, 0.5)).sum()

    x = torch.randn(2, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            torch.testing.assert_close(compiled(x, W, A, B), layer(x, W, A, B))
    compiled(x, W, A, B).sum().backward()
    got, B.grad = B.grad, None
    layer(x, W, A, B).sum().backward()
    assert A.grad is None
    torch.testing.assert_close(got, B.grad)


def test_bad_input():
    W, A, B = operands()
    for bad, error, match in (
        ((None, A, B), TypeError, "weight"), ((W, None, B), TypeError, "lora_A"), ((W, A, B[:5]), ValueError, "lora_B"),
        ((W, A, B, "1"), TypeError, "scaling"), ((W, A, B, True), TypeError, "scaling"),
        ((W, A, None, torch.tensor(1.0)), TypeError, "lora_B"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            row_norm(*bad)
