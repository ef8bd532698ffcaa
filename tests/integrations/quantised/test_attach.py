"""``attach_adapters`` on models of quantised layers: each row of a batch gets what PEFT gives with its adapter alone."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from bitsandbytes import nn as bnb
from peft import IA3Config, LoraConfig, VeraConfig
from torch import nn
from torchao import quantization as ao

import peftkern

from .layers import LIBRARIES, adapted, layer, torchao
from .test_models import llama

PARTS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "LoRA": lambda: LoraConfig(r=4, target_modules=PARTS, init_lora_weights=False),
    "rsLoRA": lambda: LoraConfig(r=7, target_modules=PARTS[1:], init_lora_weights=False, use_rslora=True),
    "DoRA": lambda: LoraConfig(r=3, target_modules=PARTS, init_lora_weights=False, use_dora=True),
    "VeRA": lambda: VeraConfig(r=8, target_modules=PARTS[:2], init_weights=False),
    "(IA)^3": lambda: IA3Config(target_modules=PARTS, feedforward_modules=PARTS[2:]),
}
WITHOUT = {"hqq": ("(IA)^3",), "torchao int8": ("VeRA",)}  # PEFT has no layers for these
IDS = torch.randint(0, 64, (6, 9), generator=torch.Generator().manual_seed(4))
X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=LIBRARIES)
def served(request, tmp_path_factory):
    """(library, {name: folder}, {name: what stock PEFT gives for IDS with this adapter alone, None: the base})."""
    library, folders = request.param, {}
    expected = {None: llama(library).train()(input_ids=IDS).logits.detach()}
    for i, (name, config) in enumerate(CONFIGS.items()):
        if name not in WITHOUT.get(library, ()):
            torch.manual_seed(10 + i)
            model = adapted(llama(library), library, config()).train()
            folders[name] = tmp_path_factory.mktemp("attach")
            model.save_pretrained(folders[name])
            expected[name] = model(input_ids=IDS).logits.detach()
    return library, folders, expected


def close(found, expected, tolerance=1e-5):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_rows_of_a_mixed_batch(served):
    library, folders, expected = served
    model = llama(library).train()
    keys = model.state_dict().keys()
    multi = peftkern.attach_adapters(model, folders)
    names = [None, *folders, "LoRA"][-6:]
    names += ["rsLoRA"] * (6 - len(names))
    with multi.use(names):
        mixed = model(input_ids=IDS).logits
    for row, name in enumerate(names):
        close(mixed[row], expected[name][row])
    for name in folders:
        with multi.use(name):
            close(model(input_ids=IDS).logits, expected[name])
        assert (expected[name] - expected[None]).abs().max() > 1e-2
    assert torch.equal(model(input_ids=IDS).logits, expected[None]) and model.state_dict().keys() == keys
    multi.detach()
    assert torch.equal(model(input_ids=IDS).logits, expected[None])


def _one(library, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(LIBRARIES[library](nn.Linear(64, 96, dtype=dtype)))


@pytest.fixture
def adapter(tmp_path):
    """A folder with an adapter of ``_one``'s layer."""
    layer("nf4", LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)).save_pretrained(tmp_path)
    return tmp_path


def _alone(library, folder, dtype=torch.float32):
    model = _one(library, dtype)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = library.startswith(("nf4", "fp4")), library == "int8"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).train()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(library, autocast, adapter):
    dtype = torch.float32 if autocast else torch.bfloat16
    model = _one(library, dtype).train()
    multi = peftkern.attach_adapters(model, {"a": adapter})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = _alone(library, adapter, dtype)(X.to(dtype))
        with multi.use(["a", None, "a"]):
            y = model(X.to(dtype))
    assert y.dtype == expected.dtype
    close(y[::2].float(), expected[::2].float(), 2e-2)


@pytest.mark.parametrize("library", ["nf4", "int8", "torchao int8", "quanto qint8", "hqq"])
def test_gradient_of_the_input(library, adapter):
    model, grads = _one(library).train(), []
    multi = peftkern.attach_adapters(model, {"a": adapter})
    for one, context in ((model, multi.use(["a"] * 3)), (_alone(library, adapter), torch.enable_grad())):
        x = X.clone().requires_grad_()
        with context:
            one(x).square().sum().backward()
        grads.append(x.grad)
    close(*grads)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("library", ["nf4", "nf4 nested", "int8", "torchao int8"])
@torch.no_grad()
def test_compiled(library, autocast, adapter):
    model = _one(library).train()
    multi = peftkern.attach_adapters(model, {"a": adapter})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for names in (["a", None, "a"], [None, "a", "a"]):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), multi.use(names):
            found, expected = compiled(X), model(X)
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def _replace(layer, other):
    """Give a layer the weight and the bias of another, as loading and quantising anew do."""
    if hasattr(layer, "W_q"):
        layer.W_q, layer.meta, layer.bias = other.W_q, other.meta, other.bias
    else:
        layer.weight, layer.bias = other.weight, other.bias
    if hasattr(layer, "state"):
        layer.state = other.state


@pytest.mark.parametrize("library", LIBRARIES)
@torch.no_grad()
def test_a_base_that_changes_is_seen(library, adapter):
    model, other = _one(library).train(), _one(library, seed=1).train()
    multi, names = peftkern.attach_adapters(model, {"a": adapter}), ["a", None, "a"]
    with multi.use(names):
        branch = model(X) - _one(library).train()(X)
        _replace(model[0], other[0])
        close(model(X), other(X) + branch)
        if not library.startswith("quanto"):  # whose weights keep their dtype
            model.bfloat16()
        y = model(X.bfloat16())
    assert y.dtype == torch.bfloat16 and branch[0].abs().max() > 0.1 > 1e-5 > branch[1].abs().max()
    close(y.float(), other(X) + branch, 2e-2)


@torch.no_grad()
def test_a_plain_layer_that_is_quantised_later(adapter):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96))
    multi = peftkern.attach_adapters(model, {"a": adapter})
    with multi.use(["a", None, "a"]):
        branch = model(X)[::2]
    branch -= model(X)[::2]
    ao.quantize_(model[0], ao.Int8WeightOnlyConfig())
    with multi.use(["a", None, "a"]):
        y = model(X)
    close(y[::2], model(X)[::2] + branch)
    close(y[1], model(X)[1])


@torch.no_grad()
def test_the_layout_of_four_bits_stays_while_attached(adapter):
    model = _one("nf4").eval()
    model[0].support_avx512bf16_for_cpu = True
    multi = peftkern.attach_adapters(model, {"a": adapter})
    model(X)
    assert not getattr(model[0].weight.quant_state, "packing_format_for_cpu", False)
    multi.detach()
    assert model[0].support_avx512bf16_for_cpu


def _dynamic():
    linear = nn.Linear(64, 96)
    ao.quantize_(linear, ao.Int8DynamicActivationInt8WeightConfig())
    return linear


class Strange(nn.Linear):
    """What no library here has."""


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (_dynamic, "no gradient"),
        (lambda: bnb.Linear4bit(64, 96), "its weight is not quantised yet"),
        (lambda: torchao(nn.Linear(64, 96, device="meta")), "device meta"),
        (lambda: Strange(64, 96), "expected torch.nn.Linear"),
    ],
    ids=["dynamic", "not yet", "meta", "unknown"],
)
def test_refused(build, why, adapter):
    with pytest.raises(ValueError, match=why):
        peftkern.attach_adapters(nn.Sequential(build()), {"a": adapter})


def test_what_becomes_unreadable_is_refused_at_the_call(adapter):
    model = _one("nf4").train()
    multi = peftkern.attach_adapters(model, {"a": adapter})
    model[0].weight.quant_state.packing_format_for_cpu = True
    with multi.use(["a", None, "a"]), pytest.raises(RuntimeError, match=r"0 has adapters attached, but .*repacked"):
        model(X)
