"""A mixed batch's next call takes over what the one before it found, and nothing that has changed since."""

import pytest
import torch
from torch import nn

import peftkern
from peftkern.integrations.hf_peft import forward as hf_peft_forward
from peftkern.methods import unchanged

pytestmark = pytest.mark.skipif(unchanged.Unchanged is None, reason="the native code is not built: no plan is kept")

NAMES = ["b", "default", "__base__", "b", "default"]


@pytest.fixture
def case(zoo, monkeypatch):
    """(model, layer, x, calls): a layer of two adapters that has been called twice; ``calls``: what each later call took over."""
    model, layer = zoo.layer(r=4)
    model.add_adapter("b", zoo.peft.LoraConfig(target_modules=["0"], r=3, lora_alpha=5))
    zoo.randomise(model).eval()
    peftkern.accelerate(model)
    x, calls, run_again = torch.randn(5, 2, 24), [], hf_peft_forward.run_again
    layer(x, adapter_names=NAMES)
    layer(x, adapter_names=NAMES)

    def spy(*args):
        y = run_again(*args)
        calls.append(y is not None)
        return y

    monkeypatch.setattr(hf_peft_forward, "run_again", spy)
    return model, layer, x, calls


def check(zoo, model, layer, x, names):
    """Output and gradients are PEFT's own, of each row by itself."""
    stock = zoo.copy(model)
    peftkern.restore(stock)
    own = stock.base_model.model[0]
    expected = own(x, adapter_names=names)
    torch.testing.assert_close(layer(x, adapter_names=names), expected, rtol=1e-4, atol=1e-5)


def _data(part, adapter, make):
    def change(layer):
        weight = getattr(layer, part)[adapter].weight
        weight.data = make(weight.data)

    return change


def _wider(w):
    return torch.randn(7, 24) if w.shape[1] == 24 else torch.randn(20, 7)


CHANGES = {
    "values in place": lambda m: m.lora_A["b"].weight.data.mul_(3.0),
    "other data": _data("lora_B", "b", lambda w: torch.randn_like(w)),
    "data in another layout": _data("lora_B", "default", lambda w: torch.randn(w.shape[::-1]).t()),
    "another parameter": lambda m: setattr(m.lora_A["default"], "weight", nn.Parameter(torch.randn(4, 24))),
    "another rank": lambda m: [_data(*part)(m) for part in (("lora_A", "b", _wider), ("lora_B", "b", _wider))],
    "another weight": lambda m: setattr(m.base_layer, "weight", nn.Parameter(torch.randn(20, 24), requires_grad=False)),
    "another scaling": lambda m: m.scaling.update(b=0.25),
    "a hook": lambda m: m.lora_A["b"].register_forward_hook(lambda m, a, y: 2 * y),
    "adapters disabled and enabled": lambda m: (m.enable_adapters(False), m.enable_adapters(True)),
    "an adapter swapped for another": lambda m: m.lora_B.update({"b": nn.Linear(3, 20, bias=False)}),
}  # fmt: skip
TAKEN_OVER = {
    "values in place",
    "other data",
    "data in another layout",
    "another weight",
    "adapters disabled and enabled",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_seen(zoo, case, change):
    model, layer, x, calls = case
    CHANGES[change](layer)
    check(zoo, model, layer, x, NAMES)
    assert calls == [change in TAKEN_OVER]
    check(zoo, model, layer, x, NAMES)
    assert calls[1] == (change != "a hook"), "the call after the change is taken over again"


def test_other_names_and_inputs(zoo, case):
    model, layer, x, calls = case
    names = list(NAMES)
    check(zoo, model, layer, x, names)
    names[3] = "__base__"  # the same list
    check(zoo, model, layer, x, names)
    names[:] = ["b", "default"]
    check(zoo, model, layer, x[:2], names)
    check(zoo, model, layer, x[:2, :1], names)
    check(zoo, model, layer, x[:2].transpose(1, 2).contiguous().transpose(1, 2), names)
    check(zoo, model, layer, x[:2, 0], names)
    assert all(calls) and len(calls) == 6
    check(zoo, model, layer, x[:2], ["default", "__base__"])  # other adapters: another plan
    assert not calls[-1]
    with pytest.raises(ValueError, match="adapter_names"):
        layer(x, adapter_names=names)
    layer(x[:2], adapter_names=["default", "__base__"], alora_offsets=None)
    assert not any(calls[-2:])


def test_gradients(zoo, case):
    model, layer, x, calls = case
    given = x.clone().requires_grad_()
    found = []
    for _ in range(2):
        model.zero_grad()
        given.grad = None
        layer(given, adapter_names=NAMES).square().sum().backward()
        found.append([given.grad.clone(), *zoo.gradients(model).values()])
        layer.__dict__["_peftkern_calls"].kept = None  # the second time with a careful look
    assert calls == [True] and len(found[0]) == 3
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_what_the_op_refuses_gets_a_careful_look(zoo, case):
    model, layer, x, calls = case
    layer.base_layer.weight.data = torch.randn(19, 24)
    with pytest.raises(RuntimeError):
        layer(x, adapter_names=NAMES)
    layer.base_layer.weight.data = torch.randn(20, 24)
    check(zoo, model, layer, x, NAMES)
    assert peftkern.status(model).fused == 3
