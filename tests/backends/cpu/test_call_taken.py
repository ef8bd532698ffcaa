"""Which calls of lora_linear the native entries take as they are, and under which choice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peftkern.backends.cpu import call, native

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")


def assert_close(y: Tensor, want: Tensor) -> None:
    assert y.shape == want.shape
    torch.testing.assert_close(y.detach().double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("layout", ["columns", "gaps", "offset", "expanded"])
def test_strides_of_every_operand(calls, exports, layout):
    def laid(t: Tensor) -> Tensor:
        if layout == "columns":
            return t.t().contiguous().t()
        if layout == "gaps":
            wide = torch.full((t.shape[0], 2 * t.shape[1] + 1), math.nan)
            wide[:, : 2 * t.shape[1] : 2] = t
            return wide[:, : 2 * t.shape[1] : 2]
        if layout == "offset":
            return torch.cat([torch.full((1, t.shape[1]), math.nan), t])[1:]
        return t[:1].expand(t.shape)

    for kind in ("vendor", "panels", "few"):
        t = calls.arguments(M=7, K=33, N=21, R=5)
        t |= {name: laid(t[name]) for name in ("x", "weight", "lora_A", "lora_B")}
        if kind == "few" and 1 not in t["weight"].stride():
            continue
        assert_close(calls.known(t, kind), calls.expected(t))


def test_leading_dimensions(calls):
    for shape in ((20,), (2, 3, 20), (1, 5, 1, 20), (0, 3, 20), (3, 0, 20)):
        t = calls.arguments(x=torch.randn(shape))
        y = calls.known(t)
        assert y.shape == (*shape[:-1], 9) and y.is_contiguous()
        assert_close(y.reshape(-1, 9), calls.expected(t | dict(x=t["x"].reshape(-1, 20))))
    # Rows at no constant step are for others to copy.
    assert not calls.learn(calls.arguments(x=torch.randn(3, 2, 20).transpose(0, 1)), "panels")
    # But where there is only one step they are.
    sliced = torch.randn(4, 6, 20)[:, ::2][:, :1]
    t = calls.arguments(x=sliced)
    assert_close(calls.known(t).reshape(-1, 9), calls.expected(t | dict(x=sliced.reshape(-1, 20))))


def test_results_are_ordinary_tensors(calls, exports):
    t = calls.arguments()
    y = calls.known(t)
    assert type(y) is Tensor and not y.requires_grad and not y.is_inference() and y.untyped_storage().resizable()
    assert y._version == 0 and y.is_leaf
    for kind in ("vendor", "panels"):
        calls.learn(t, kind)
        with torch.inference_mode():
            assert calls.forward(t).is_inference()
    with torch.no_grad(), torch.autocast("cpu"):
        assert torch.equal(calls.forward(t), y)
    t["weight"] = torch.nn.Parameter(t["weight"])
    assert torch.equal(calls.known(t), y)
    wanted = t | dict(want_u=True)
    assert calls.learn(wanted, "panels")
    again, u, h = calls.forward(wanted)
    assert torch.equal(again, y) and u.dtype == torch.float32 and h is None


class Subclass(Tensor):
    pass


OTHERS = {
    "a subclass": lambda t: t.as_subclass(Subclass),
    "another device": lambda t: t.to("meta"),
    "a negative view": torch._neg_view,
    "a part of a conjugate": lambda t: torch.complex(t, t).conj().imag,
    "sparse": lambda t: t.to_sparse(),
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape),
    "fp64": lambda t: t.double(),
    "integers": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "one more column": lambda t: torch.cat([t, t[:, :1]], dim=1),
    "one more row": lambda t: torch.cat([t, t[:1]]),
    "one dimension": lambda t: t.flatten(),
    "no tensor": lambda t: 3,
    "None": lambda t: None,
}


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("other", OTHERS)
def test_what_is_not_ordinary_is_not_taken(calls, name, other):
    t = calls.arguments()
    calls.known(t)
    changed = t | {name: OTHERS[other](t[name])}
    assert calls.forward(changed) is None
    if name == "x" and other == "one more row":
        return  # another M: a call of its own
    assert calls.learn(changed, "panels") is False


@pytest.mark.parametrize("name, value", [
    ("threads", 0), ("threads", "two"), ("bias", torch.randn(8)), ("bias", torch.randn(9).double()), ("scaling", "one"),
    ("dropout_p", 1.0), ("dropout_p", -0.1), ("dropout_p", math.nan), ("dropout_p", 0.5), ("scales", (None,) * 4),
    ("scales", [None] * 5), ("scales", (torch.randn(9),) + (None,) * 4), ("bias", torch.randn(9).bfloat16()),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_not_taken(calls, name, value):
    t = calls.arguments() | {name: value}
    assert calls.learn(t, "panels") is False
    assert calls.forward(t) is None
    assert call.forward(calls, 1) is None and call.forward() is None


def test_a_base_of_another_kind_is_not_taken_for_dense(calls):
    """Whose first tensor may look like a weight."""
    t = calls.arguments(N=20)
    calls.known(t)
    for changes in (dict(kind="nf4"), dict(kind="none"), dict(kind=None), dict(kind="identity")):
        assert calls.forward(t | changes) is None and calls.learn(t | changes, "panels") is False
    with pytest.raises(ValueError, match="panels"):
        calls.learn(t | dict(kind="identity", weight=None), "panels")
    with pytest.raises(ValueError, match="identity"):
        calls.learn(t, "identity")


def test_a_seed_that_does_not_fit_is_not_taken(calls):
    for seed in (
        None,
        3,
        torch.tensor([3], dtype=torch.int32),
        torch.tensor([3, 4]),
        torch.tensor([3.0]),
        torch.empty(0).long(),
    ):
        assert calls.learn(calls.arguments(dropout_p=0.5, seed=seed), "panels") is False
    assert calls.learn(calls.arguments(dropout_p=0.5, seed=torch.tensor(3)), "panels") is True


def test_no_plan_is_stale(calls):
    t = calls.arguments(M=5, K=20, N=9, R=3)
    calls.known(t)
    new = calls.arguments
    others = [
        new(M=6), new(K=21), new(N=10), new(R=4), new(bias=torch.randn(9)), new(threads=2),
        new(dropout_p=0.1, seed=torch.tensor([1])), new(scales=(torch.randn(3),) + (None,) * 4),
        new(dtype=torch.bfloat16),
        new(dtype=torch.bfloat16, adapter=torch.float32),
    ]  # fmt: skip
    for other in others:
        assert calls.forward(other) is None
    assert type(calls)().forward(t) is None
    assert calls.forward(t) is not None
    # Memory and dtype may change behind a parameter's back.
    w = t["weight"] = torch.nn.Parameter(t["weight"], requires_grad=False)
    calls.known(t)
    w.data = torch.randn(9, 20)
    assert_close(calls.forward(t), calls.expected(t))
    w.data = torch.randn(9, 40)[:, ::2]
    assert calls.forward(t) is None, "other strides are another choice"
    w.data = torch.randn(10, 20)
    assert calls.forward(t) is None
    w.data = torch.randn(9, 20).bfloat16()
    assert calls.forward(t) is None


def test_a_plan_holds_for_one_instruction_set(calls):
    t = calls.arguments()
    calls.known(t)
    if native._C.isa() == "plain":
        pytest.skip("this CPU has one level")
    native._C.set_isa("plain")
    try:
        assert calls.forward(t) is None
    finally:
        native._C.set_isa("auto")
    assert calls.forward(t) is not None


def test_kinds_that_cannot_compute_a_product_are_refused(calls):
    t = calls.arguments()
    for kind in ("identity", "given", "", "bf16", "amx"):
        with pytest.raises(ValueError, match="cannot be computed"):
            calls.learn(t, kind)
    with pytest.raises(ValueError, match="few"):
        calls.learn(calls.arguments(M=native._C.base_few_rows + 1), "few")
    with pytest.raises(ValueError, match="few"):
        calls.learn(calls.arguments(weight=torch.randn(18, 40)[::2, ::2]), "few")
    with pytest.raises(TypeError):
        calls.learn(t, 3)
    assert calls.forward(t) is None


def test_plans_are_forgotten_before_they_are_too_many(calls):
    t = calls.arguments(M=1, K=1, N=1, R=1)
    kept = type(calls)()
    kept.known(t)
    for _ in range(2):
        for _ in range(4096):
            assert type(calls)().learn(t, "panels")
    assert kept.forward(t) is None
