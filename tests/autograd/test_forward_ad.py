"""Forward-mode AD: no op drops a tangent without a word. What is no tensor of a call goes on as it did."""

import pytest
import torch
import torch.autograd.forward_ad as fwd

import peftkern
from peftkern.autograd.block_rotate import block_rotate
from peftkern.autograd.multi_lora_linear import known_multi_lora_linear
from peftkern.autograd.row_norm import row_norm
from peftkern.many.route import route
from peftkern.many.table import table_of
from peftkern.methods import METHODS
from peftkern.methods.registry import Held, Plan

M, K, N, R = 6, 16, 16, 4
IDS = torch.tensor([0, -1, 0, 0, -1, 0])


def _known(x, W, A, B):
    table = table_of([(A, B, 2.0)], x, x.dtype, None)
    return known_multi_lora_linear(x, W, table, *route(IDS, x, table), None)


def _plan(x, W, A, B):
    return Plan(W, None, [Held("a", METHODS["LoRA"], (A, B, None), (2.0,))]).run(x)


def _bottleneck(x, W, A, B):
    return peftkern.bottleneck_adapter(x, A, B, residual=torch.ones_like(x) @ W)


def _multi_bottleneck(x, W, A, B):
    return peftkern.multi_bottleneck_adapter(x, [peftkern.Bottleneck(A, B)], IDS)


# Each with the names of the tensors that it reads.
CALLS = {
    "lora_linear": (peftkern.lora_linear, "xWAB"),
    "plan": (_plan, "xWAB"),
    "known_multi_lora_linear": (_known, "xWAB"),
    "multi_lora_linear": (lambda x, W, A, B: peftkern.multi_lora_linear(x, W, [(A, B, 2.0)], IDS), "xWAB"),
    "sgmv": (lambda x, W, A, B: peftkern.sgmv(x, [(A, B, 2.0)], IDS), "xAB"),
    "sgmv, out": (lambda x, W, A, B: peftkern.sgmv(x, [(A, B, 2.0)], IDS, out=W[:M] + 0), "xWAB"),
    "bottleneck_adapter": (_bottleneck, "xWAB"),
    "multi_bottleneck_adapter": (_multi_bottleneck, "xAB"),
    "expert_lora_linear": (lambda x, W, A, B: peftkern.expert_lora_linear(x, W[None], A[None], B[None], [M]), "xWAB"),
    "reft": (lambda x, W, A, B: peftkern.reft(x, A, B.t(), positions=torch.tensor([1, 3])), "xAB"),
    "block_rotate": (lambda x, W, A, B: block_rotate(x, A.reshape(4, 4, 4)), "xA"),
    "row_norm": (lambda x, W, A, B: row_norm(W, A, B), "WAB"),
}


def _tensors():
    return {"x": torch.randn(M, K), "W": torch.randn(N, K), "A": torch.randn(R, K), "B": torch.randn(N, R)}


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize(("name", "part"), [(name, part) for name, (_, parts) in CALLS.items() for part in parts])
def test_a_tangent_raises(name, part, seen):
    given, (call, _) = _tensors(), CALLS[name]
    expected = [call(*given.values()) for _ in range(3)] if seen else None  # its shortest way
    with fwd.dual_level():
        dual = fwd.make_dual(given[part], torch.ones_like(given[part]))
        with pytest.raises(NotImplementedError):
            call(*(given | {part: dual}).values())
        if seen:  # nothing of this call has a tangent
            assert torch.equal(call(*given.values()), expected[-1])


def test_a_tangent_of_a_gradient_raises():
    given = _tensors()
    A = given["A"].requires_grad_()
    with fwd.dual_level():
        y = peftkern.lora_linear(*given.values())
        with pytest.raises(NotImplementedError, match="lora_linear does not support forward-mode AD"):
            torch.autograd.grad(y, A, fwd.make_dual(torch.ones_like(y), torch.ones_like(y)))


def test_the_message_names_the_op():
    given = _tensors()
    with fwd.dual_level():
        x = fwd.make_dual(given.pop("x"), torch.ones(M, K))
        with pytest.raises(NotImplementedError, match=r"^lora_linear does not support forward-mode AD"):
            _plan(x, **given)
