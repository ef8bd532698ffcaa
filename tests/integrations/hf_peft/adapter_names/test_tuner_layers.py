"""One layer of other tuners than LoRA in a batch with ``adapter_names``: dtypes, dropout, shapes, changes between calls."""

import itertools
import sys

import pytest
import torch
from torch import nn

import peftkern
from peftkern.integrations import hf_peft
from peftkern.many.table import table_of

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
K, N = 24, 20
NAMES = ["b", "default", "__base__", "b", "default"]
CONFIGS = {
    "AdaLoRA": lambda **options: peft.AdaLoraConfig(
        init_r=6, target_r=3, total_step=10, inference_mode=True, **options
    ),
    "VeRA": lambda **options: peft.VeraConfig(r=9, **options),
    "(IA)^3": lambda **options: peft.IA3Config(feedforward_modules=[], **options),
    "(IA)^3 of the input": lambda **options: peft.IA3Config(feedforward_modules=["0"], **options),
}
DROPS = {"AdaLoRA": "lora_dropout", "VeRA": "vera_dropout"}


def build(name, dtype=torch.float32, bias=True, **options):
    """A model of one layer with two adapters, in evaluation, and that layer."""
    config = CONFIGS[name](target_modules=["0"], **options)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N, bias=bias, dtype=dtype)), config)
    model.add_adapter("b", CONFIGS[name](target_modules=["0"], **options))
    layer = model.base_model.model[0]
    for adapter in ("default", "b"):
        layer.set_requires_grad(adapter)
    for p in layer.parameters():
        if p.requires_grad:
            p.data = (torch.randn(p.shape) + ("(IA)" in name)).to(p.dtype)
    return model.eval(), layer


def alone(layer, x):
    """Each row by its adapter alone, in PEFT's own code."""
    rows = []
    for row, name in zip(x, NAMES, strict=True):
        layer.set_adapter([] if name == "__base__" else [name])
        rows.append(layer(row[None]))
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_dtypes(zoo, fused_mixed, name, dtype):
    model, layer = build(name, dtype)
    x = torch.randn(len(NAMES), 6, K).to(dtype)
    stock, exact = alone(layer, x), alone(zoo.copy(layer).double(), x.double())
    peftkern.accelerate(model)
    ours = layer(x, adapter_names=NAMES)
    assert len(fused_mixed) == 1
    zoo.as_accurate(ours, stock, exact)


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast(zoo, fused_mixed, name):
    model, layer = build(name)
    x = torch.randn(len(NAMES), 6, K)
    exact = alone(zoo.copy(layer).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        stock = alone(layer, x)
        peftkern.accelerate(model)
        ours, base = layer(x, adapter_names=NAMES), layer(x, adapter_names=["__base__"] * len(NAMES))
        layer.set_adapter(["b"])
        assert ours.dtype == base.dtype == layer(x).dtype
    assert len(fused_mixed) == 1
    zoo.as_accurate(ours, stock, exact)


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_of_the_input(fused_mixed, name):
    model, layer = build(name, bias=False)
    xs = [torch.randn(len(NAMES), *shape) for shape in ((K,), (1, K), (4, 3, K), (0, K))]
    xs.append(torch.randn(len(NAMES), 5, 2 * K)[:, :, ::2])
    stock = [alone(layer, x) for x in xs]
    peftkern.accelerate(model)
    for x, y in zip(xs, stock, strict=True):
        torch.testing.assert_close(layer(x, adapter_names=NAMES), y, rtol=1e-4, atol=1e-4)
    assert len(fused_mixed) == len(xs)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_changes_between_calls_is_seen(zoo, name):
    model, layer = build(name)
    twin, x = zoo.copy(layer), torch.randn(len(NAMES), 6, K)
    peftkern.accelerate(model)

    def in_place(m):
        for part in m.adapter_layer_names:
            for p in getattr(m, part).parameters():
                p.data.mul_(1.5)

    def replaced(m):
        held = next(t for t in (getattr(m, name) for name in m.adapter_layer_names) if "b" in t)
        held["b"] = nn.Parameter(held["b"].detach() * 2.0)

    def half(m):
        m.base_layer.bfloat16()

    def base(m):
        m.base_layer.weight.data.neg_()

    seen = []
    for change in (lambda m: None, in_place, replaced, base, half):
        change(layer), change(twin)
        given = x.to(layer.base_layer.weight.dtype)
        for _ in range(2):
            y = layer(given, adapter_names=NAMES)
        stock, exact = alone(twin, given), alone(zoo.copy(twin).double(), given.double())
        zoo.as_accurate(y, stock, exact)
        seen.append(y.detach().float())
    assert all(not torch.allclose(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("name", DROPS)
def test_dropout_is_that_of_the_gradients(name):
    model, layer = build(name, bias=False, **{DROPS[name]: 0.5})
    peftkern.accelerate(model)
    layer.train()
    with torch.no_grad():
        layer.base_layer.weight.zero_()
    x = torch.randn(len(NAMES), 6, K, requires_grad=True)
    first = layer(x, adapter_names=NAMES)
    y = layer(x, adapter_names=NAMES)
    assert not torch.equal(first, y) and not y[2].any()
    y.backward(torch.ones_like(y))
    # Linear in x, and in each trained tensor of both adapters together: only with the same mask both ways.
    total = y.detach().double().sum()
    torch.testing.assert_close((x.double() * x.grad.double()).sum(), total, rtol=1e-4, atol=1e-4)
    for part in layer.adapter_layer_names:
        pairs = [(p.double(), p.grad.double()) for p in getattr(layer, part).parameters()]
        found = sum((p * g).sum() for p, g in pairs)
        assert not pairs or torch.allclose(found, total, rtol=1e-4, atol=1e-4), part
    assert 0.4 < (x.grad[[0, 1, 3, 4]] == 0).double().mean() < 0.6


def test_dropout_by_its_mask(name="VeRA"):
    model, layer = build(name, vera_dropout=0.5)
    x = torch.randn(len(NAMES), 6, K)
    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    dropped = x * peftkern.dropout_mask(len(NAMES) * 6, K, 0.5, seed).view(x.shape) * 2.0
    expected = alone(layer, dropped) + layer.base_layer(x) - layer.base_layer(dropped)
    expected[2] = layer.base_layer(x[2])
    peftkern.accelerate(model)
    layer.train()
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x, adapter_names=NAMES), expected, rtol=1e-4, atol=1e-4)


def test_projections_of_vera_are_not_copied(monkeypatch):
    """A and B of all adapters are the model's own two tensors, made for its largest layer."""
    tables = []

    def kept(*args, **options):
        tables.append(table_of(*args, **options))
        return tables[-1]

    monkeypatch.setattr(sys.modules[peftkern.multi_lora_linear.__module__], "table_of", kept)
    config = peft.VeraConfig(r=9, target_modules=["0", "1"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N), nn.Linear(N, 16)), config)
    model.add_adapter("b", config)
    peftkern.accelerate(model)
    x = torch.randn(3, 5, K)
    model.eval()(x, adapter_names=["b", "default", "__base__"])
    A, B = model.base_model.vera_A["default"], model.base_model.vera_B["default"]
    assert [{w.data_ptr() for w in t.weights} for t in tables] == [{A.data_ptr(), B.data_ptr()}] * 2


def test_compiled(name="VeRA"):
    model, layer = build(name)
    peftkern.accelerate(model)
    x = torch.randn(len(NAMES), 4, K)
    compiled = torch.compile(lambda t: layer(t, adapter_names=NAMES), fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x, adapter_names=NAMES), rtol=1e-5, atol=1e-5)


def test_why_not(name="(IA)^3"):
    model, layer = build(name)
    x = torch.randn(2, 3, K)
    assert "not accelerated" in hf_peft.why_not(layer, x, ["b", "default"])
    peftkern.accelerate(model)
    assert hf_peft.why_not(layer, x, ["b", "default"]) is None
    assert hf_peft.why_not(layer, x, ["__base__"] * 2) == "it has no adapter of the batch"
    assert "adapter_names has 3 entries" in hf_peft.why_not(layer, x, ["b"] * 3)
    peftkern.restore(model)
    with pytest.raises(TypeError, match="adapter_names"):  # PEFT's own
        layer(x, adapter_names=["b", "default"])


def test_a_form_of_a_method_that_folds_the_weight_takes_no_names():
    """MiSS's ``bat``: its other forms are coefficients, this one is another weight, which no row has alone."""
    config = peft.MissConfig(r=4, init_weights="bat", target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    layer = model.base_model.model[0]
    peftkern.accelerate(model)
    with pytest.raises(ValueError, match="not covered for MiSS"):
        layer(torch.randn(2, 8), adapter_names=["default", "default"])
