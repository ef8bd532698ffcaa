"""ReFT of AdapterHub in whole models: accelerated, every output and gradient is the library's own."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import adapters
import pytest
import torch
from adapters.context import ForwardContext
from adapters.methods.reft import ReftModule

import peftkern
from peftkern import settings

from .models import BATCH, HIDDEN, LAYERS, LENGTH, adapted, batch, outcome, same, trained

F64 = torch.float64
CONFIGS = {
    "loreft": adapters.LoReftConfig(r=4, dropout=0.0),
    "noreft": adapters.NoReftConfig(r=4, dropout=0.0),
    "direft": adapters.DiReftConfig(r=4, dropout=0.0),
    "suffix alone": adapters.LoReftConfig(r=2, prefix_positions=0, suffix_positions=2, dropout=0.0),
    "both": adapters.LoReftConfig(r=2, suffix_positions=2, dropout=0.0),
    "both overlap": adapters.NoReftConfig(r=2, prefix_positions=4, suffix_positions=4, dropout=0.0),
    "tied": adapters.LoReftConfig(r=2, suffix_positions=4, tied_weights=True, dropout=0.0),
    "tied, a prefix alone": adapters.LoReftConfig(r=2, tied_weights=True, dropout=0.0),
    "gelu": adapters.LoReftConfig(r=2, non_linearity="gelu", dropout=0.0),
    "a square rotation": adapters.LoReftConfig(r=HIDDEN, dropout=0.0),
    "one layer": adapters.LoReftConfig(r=2, layers=[1], dropout=0.0),
}


@pytest.fixture(autouse=True)
def small():
    """Small calls without a rotation too, which the library's own code computes faster."""
    with settings.using(small_calls=True):
        yield


@pytest.fixture(autouse=True)
def double():
    """The library puts rows of the default dtype for what is empty, and raises where the model has another."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def turned(model):
    """The model with rotations that are not what its ``base`` says alone."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("weight.original"):
                p += torch.randn_like(p).triu(1)
    return model


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_models(kind, name):
    model, inputs = turned(adapted(kind, CONFIGS[name])), batch()
    report = same(model, inputs)
    layers = [1] if name == "one layer" else range(LAYERS)
    stem = "encoder.layer" if kind == "bert" else "layers"
    assert report.accelerated == [f"{stem}.{i}.reft_layer.refts.a" for i in layers] and not report.skipped
    status = peftkern.status(model)
    assert (status.fused, status.stock) == (len(layers), 0)
    peftkern.restore(model)
    torch.testing.assert_close(outcome(model, inputs), outcome(copy.deepcopy(model), inputs))


@pytest.mark.parametrize("padding", ["left", "none"])
@pytest.mark.parametrize("name", ["loreft", "both", "tied"])
def test_padding(name, padding):
    inputs = batch("left" if padding == "left" else "right")
    if padding == "none":
        del inputs["attention_mask"]
    model = turned(adapted("llama", CONFIGS[name]))
    same(model, inputs)
    assert peftkern.status(model).stock == 0
    # of one sequence the library's lengths have no dimension
    same(model, {name: v[:1] for name, v in inputs.items()})
    assert peftkern.status(model).stock == 0


def test_small_calls_without_a_rotation_stay_with_the_library(recwarn):
    with settings.using(small_calls=False):
        for config, fused in ((CONFIGS["noreft"], 0), (CONFIGS["loreft"], LAYERS)):
            model, inputs = adapted("bert", config), batch()
            same(model, inputs)
            status = peftkern.status(model)
            assert (status.fused, status.stock) == (fused, LAYERS - fused)
            assert all("too small to gain" in reason for reason in status.reasons.values())
    assert not [w for w in recwarn if "peftkern" in str(w.message)]


def test_a_unit_without_positions_has_gradients_that_are_zero():
    model = adapted("bert", CONFIGS["loreft"])
    peftkern.accelerate(model)
    _, grads = outcome(model, batch())
    unused = [g for name, g in grads.items() if ".units.1." in name]
    assert len(unused) == 3 * LAYERS and not any(g.any() for g in unused)


def test_cached_decoding_edits_each_token_as_a_prefix():
    model = turned(adapted("llama", CONFIGS["loreft"], train=False))
    ids = batch()["input_ids"]

    def decode():
        first = model(input_ids=ids, use_cache=True)
        return model(input_ids=ids[:, :1], past_key_values=first.past_key_values, use_cache=True)[0]

    with torch.no_grad():
        expected = decode()
        peftkern.accelerate(model)
        torch.testing.assert_close(decode(), expected, rtol=1e-9, atol=1e-9)
    assert peftkern.status(model).stock == 0
    with torch.inference_mode():
        torch.testing.assert_close(decode(), expected, rtol=1e-9, atol=1e-9)


def alone(config, **context):
    """A module, accelerated, and what calls it in a context of its own."""
    module = ReftModule(HIDDEN, config).train()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p += torch.randn_like(p).triu(1) if name.endswith("weight.original") else torch.randn_like(p)

    def call(x, module=module):
        with ForwardContext(object()) as now:
            vars(now).update(context)
            return module(x)

    return module, call


@pytest.mark.parametrize("variant", [adapters.LoReftConfig, adapters.NoReftConfig, adapters.DiReftConfig])
@pytest.mark.parametrize("tied", [False, True])
def test_dropout_by_a_shared_mask(variant, tied, shared_mask, monkeypatch):
    """It is of whole edited rows. The mask of the library's second unit is that of its own rows, as here."""
    from peftkern.autograd.residual import reft as ours

    monkeypatch.setattr(ours, "seed_tensor", lambda seed, device: torch.tensor(shared_mask))
    module, call = alone(variant(r=3, suffix_positions=2, tied_weights=tied, dropout=0.4))
    x = torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True)
    leaves, dy = [x, *module.parameters()], torch.randn_like(x)
    found = []
    for _ in range(2):
        y = call(x)
        found.append((y, *torch.autograd.grad(y, leaves, dy)))
        peftkern.accelerate(module)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert peftkern.status(module).fused == 1
    assert (found[0][0][:, :3] == 0).any() and not (found[0][0][:, 3:-2] == 0).any()


CASES = {
    "the sequence is shorter than the suffix": (dict(suffix_positions=3), (2, 2, HIDDEN), {}),
    "positions beyond the sequence": (dict(), (2, 4, HIDDEN), {"offsets": torch.tensor([0, 3]), "seqlens": torch.tensor([4, 1])}),
    "indices of another batch": (dict(), (2, 4, HIDDEN), {"pref_idx": torch.zeros(1, 1, HIDDEN, dtype=torch.int64)}),
    "fp32 beside a default of fp64": (dict(), (2, 4, HIDDEN), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_the_library_cannot_stays_with_it(case):
    options, shape, context = CASES[case]
    module, call = alone(adapters.LoReftConfig(r=2, dropout=0.0, **options), **context)
    x = torch.randn(shape)
    if case.startswith("fp32"):
        module.float()
        x = x.float()
    outcomes = []
    for warns in (nullcontext(), pytest.warns(RuntimeWarning, match="runs AdapterHub's own code")):
        with warns:
            try:
                outcomes.append(call(x))
            except RuntimeError as error:
                outcomes.append(str(error))
        peftkern.accelerate(module)
    status = peftkern.status(module)
    assert status.fused == 0 and status.stock == 1 and status.reasons
    assert outcomes[0] == outcomes[1] if isinstance(outcomes[0], str) else torch.equal(*outcomes)


@pytest.mark.parametrize("both", [False, True])
def test_indices_are_kept_as_the_library_keeps_them(both):
    """A context's first input says where later ones are edited, if it has a prefix alone, or a suffix that still fits."""
    module, _ = alone(adapters.NoReftConfig(r=2, suffix_positions=2 * both, dropout=0.0))
    inputs = [torch.randn(2, T, HIDDEN) for T in (6, 8, 4)]
    found = []
    for _ in range(2):
        with ForwardContext(object()):
            found.append([module(x) for x in inputs])
        peftkern.accelerate(module)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert peftkern.status(module).stock == 0


def test_weight_decay_makes_the_rotation_zero_here_too():
    """torch rounds the signs of its parametrisation to integers, and so does what is accelerated: the library's meaning."""
    model = adapted("bert", CONFIGS["loreft"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    inputs = batch()
    outcome(model, inputs)
    optimizer.step()
    expected = outcome(model, inputs)
    peftkern.accelerate(model)
    torch.testing.assert_close(outcome(model, inputs), expected)
    assert not model.encoder.layer[0].reft_layer.refts["a"].units[0].projection.weight.any()


def test_training_and_checkpoints(tmp_path):
    stock = turned(adapted("bert", adapters.LoReftConfig(r=4, suffix_positions=2, dropout=0.0)))
    ours = copy.deepcopy(stock)
    before = {name: (v.shape, v.dtype) for name, v in ours.state_dict().items()}
    assert len(peftkern.accelerate(ours).accelerated) == LAYERS
    losses = [trained(model, torch.optim.SGD, lr=0.05) for model in (stock, ours)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-9, atol=0.0)
    assert losses[0][-1] != losses[0][0]
    assert before == {name: (v.shape, v.dtype) for name, v in ours.state_dict().items()}
    ours.save_adapter(str(tmp_path), "a")
    again = adapted("bert", CONFIGS["loreft"])
    again.load_state_dict({k: v for k, v in ours.state_dict().items() if "refts" not in k}, strict=False)
    again.load_adapter(str(tmp_path), load_as="b", set_active=True)
    for model in (again, ours):
        model.eval()
    inputs = batch()
    torch.testing.assert_close(again(**inputs)[0], ours(**inputs)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    """Against the library in fp64: no further off than the library in this dtype."""
    module, call = alone(adapters.NoReftConfig(r=3, suffix_positions=2, dropout=0.0))
    module.to(dtype)
    x = torch.randn(BATCH, LENGTH, HIDDEN).to(dtype)
    exact, theirs = call(x.double(), copy.deepcopy(module).double()), call(x)
    assert peftkern.accelerate(module).accelerated
    ours = call(x)
    assert ours.dtype == dtype and peftkern.status(module).fused == 1
    worst = [(y.double() - exact).abs().max().item() for y in (ours, theirs)]
    assert worst[0] <= 1.5 * worst[1]


def test_autocast():
    """No further off the library in fp64 than the library under autocast, whose rotation is rounded too."""
    model = adapted("bert", adapters.LoReftConfig(r=4, dropout=0.0), train=False)
    inputs, worst = batch(), []
    with torch.no_grad():
        exact = model(**inputs)[0]
        model.float()
        torch.set_default_dtype(torch.float32)
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = model(**inputs)[0]
            worst.append((y.double() - exact).abs().mean())
            peftkern.accelerate(model)
    assert worst[1] <= 1.5 * worst[0] and peftkern.status(model).stock == 0
