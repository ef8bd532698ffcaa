"""accelerate, restore, patch and unpatch: what they switch, how often, and what the report says."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from packaging.version import Version

import peftkern
from peftkern.integrations import hf_peft
from peftkern.integrations.hf_peft import forward as hf_peft_forward


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Accelerated models that earlier tests left to the garbage collector do not count."""
    monkeypatch.setattr(hf_peft_forward.switch, "marks", weakref.WeakSet())
    hf_peft.unpatch()


def plain(zoo):
    """PEFT's own forward is the one in PEFT's class."""
    forward = zoo.peft.tuners.lora.layer.Linear.forward
    return not hasattr(forward, "__wrapped__") and forward.__globals__["__name__"] == "peft.tuners.lora.layer"


def test_idempotence_and_restore(zoo, fused):
    model, layer = zoo.layer()
    x = torch.randn(3, 24)
    assert plain(zoo)
    expected = layer(x)
    reports = [peftkern.accelerate(model) for _ in range(3)]
    assert reports[0] == reports[1] == reports[2] and not plain(zoo)
    torch.testing.assert_close(layer(x), expected)
    assert len(fused) == 1
    for _ in range(2):
        peftkern.restore(model)
        assert torch.equal(layer(x), expected) and len(fused) == 1
        assert plain(zoo) and not any("peftkern" in key for key in vars(layer))
    peftkern.accelerate(model)
    layer(x)
    assert len(fused) == 2


def test_models_are_switched_one_by_one(zoo, fused):
    (first, a), (second, b) = zoo.layer(), zoo.layer()
    x = torch.randn(3, 24)
    peftkern.accelerate(first)
    a(x), b(x)
    assert len(fused) == 1
    peftkern.accelerate(second)
    peftkern.restore(first)
    a(x), b(x)
    assert len(fused) == 2
    assert hf_peft.why_not(b) is None and "not accelerated" in hf_peft.why_not(a)


def test_part_of_a_model(zoo, fused):
    model = zoo.build("llama")
    report = peftkern.accelerate(model.base_model.model.model.layers[0].self_attn)
    assert report.accelerated == ["q_proj", "k_proj", "v_proj", "o_proj"]
    model(**zoo.batch("llama"))
    assert len(fused) == 4


def test_adapters_of_a_transformers_model(zoo, fused):
    # transformers' own add_adapter: no PeftModel around it.
    if Version(zoo.peft.__version__) < Version("0.20"):
        pytest.skip("transformers' add_adapter needs PEFT 0.20")
    model = zoo.build("llama").unload()
    model.add_adapter(zoo.peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "mine")
    inputs = zoo.batch("llama")
    expected = model(**inputs).logits
    report = peftkern.accelerate(model)
    assert report.accelerated == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    model.disable_adapters()
    model(**inputs)
    assert len(fused) == 2


def test_patch_takes_models_made_before_and_after(zoo, fused):
    before, a = zoo.layer()
    x = torch.randn(3, 24)
    hf_peft.patch()
    hf_peft.patch()
    _, b = zoo.layer()
    a(x), b(x)
    assert len(fused) == 2
    hf_peft.unpatch()
    a(x), b(x)
    assert len(fused) == 2
    hf_peft.unpatch()
    assert plain(zoo)


def test_patch_and_accelerate_and_restore_together(zoo, fused):
    model, layer = zoo.layer()
    other, elsewhere = zoo.layer()
    x = torch.randn(3, 24)
    peftkern.accelerate(model)
    hf_peft.patch()
    hf_peft.unpatch()
    layer(x)
    assert len(fused) == 1  # a model accelerated by name stays so
    hf_peft.patch()
    peftkern.restore(model)
    layer(x), elsewhere(x)
    assert len(fused) == 2  # restore holds for its model, the patch for the rest
    peftkern.accelerate(model)
    layer(x)
    assert len(fused) == 3
    peftkern.restore(model), peftkern.restore(other)


def test_the_class_is_plain_again_when_the_last_accelerated_model_is_gone(zoo):
    model, _ = zoo.layer()
    other, _ = zoo.layer()
    peftkern.accelerate(model)
    peftkern.accelerate(other)
    del model
    gc.collect()
    assert not plain(zoo)
    peftkern.restore(other)
    assert plain(zoo)


def test_report(zoo):
    model = zoo.build("llama")
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    for layer in model.base_model.model.model.layers:
        layer.mlp.down_proj.merge()
    report = peftkern.accelerate(model)
    assert len(report.accelerated) == 9 and len(report.skipped) == 3
    assert list(report.by_reason().values()) == [
        [f"base_model.model.model.layers.{i}.mlp.down_proj" for i in (0, 1)],
        ["base_model.model.model.layers.0.self_attn.q_proj"],
    ]
    text = str(report)
    assert text.splitlines()[0] == "peftkern: 9 of 12 PEFT layers accelerated"
    assert "2 run PEFT's own code: its adapters are merged into the base weight" in text
    assert "the base weight requires grad" in text and "self_attn.q_proj" in text
    everything = peftkern.Report(skipped={f"layer{i}": "a reason" for i in range(9)})
    assert "layer0, layer1, layer2 and 6 more" in str(everything)
    assert str(peftkern.accelerate(torch.nn.Linear(2, 2))) == "peftkern: the model has no PEFT layer"


@pytest.mark.parametrize("function", [peftkern.accelerate, peftkern.restore])
def test_a_model_must_be_a_module(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        function("model")


def test_import_loads_no_peft():
    code = (
        "import sys, peftkern, peftkern.integrations\n"
        "assert not {'peft', 'transformers', 'triton'} & set(sys.modules)\n"
        "peftkern.accelerate, peftkern.restore, peftkern.status, peftkern.Report\n"
        "assert 'peft' not in sys.modules\n"
        "peftkern.accelerate(peftkern.LoRALinear(2, 2))\n"
        "assert 'peft' in sys.modules and 'adapters' not in sys.modules\n"
        "from peft.tuners.lora.layer import Linear\n"
        "assert not hasattr(Linear.forward, '__wrapped__')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
