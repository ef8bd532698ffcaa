"""``adapter_names`` on models of tuners for which PEFT has no such batches, in evaluation and in training."""

import functools
import threading

import pytest
import torch
from torch import nn

import peftkern
from peftkern.integrations import hf_peft
from peftkern.methods import METHODS

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")

NAMES = ["first", "__base__", "second", "third", "first", "second"]
ADAPTERS = ("first", "second", "third")
pytestmark = pytest.mark.filterwarnings("ignore:.*was reported as accelerated")


def _ia3(target_modules, **options):
    return peft.IA3Config(target_modules=target_modules, feedforward_modules=target_modules[-1:], **options)


def _adalora(r, **options):
    # PEFT lets one adapter of AdaLoRA train at a time.
    return peft.AdaLoraConfig(init_r=r, target_r=2, total_step=10, inference_mode=r != 4, lora_alpha=5, **options)


def _plain(cls, **more):
    return lambda r, **options: cls(**more, **options)


CONFIGS = {
    "AdaLoRA": _adalora,
    "VeRA": _plain(peft.VeraConfig, r=10),
    "(IA)^3": lambda r, **options: _ia3(**options),
    "DeLoRA": lambda r, **options: peft.DeloraConfig(r=r, delora_lambda=r, **options),
    "BEFT": _plain(peft.BeftConfig),
    "PVeRA": _plain(peft.PveraConfig, r=8),
    "TinyLoRA": lambda r, **options: peft.TinyLoraConfig(r=2, u=r, **options),
    "OSF": lambda r, **options: peft.OSFConfig(effective_rank=1 - r / 20, **options),
    "MiSS": lambda r, **options: peft.MissConfig(r=r, **options),
    "Uni-LoRA": _plain(peft.UniLoraConfig, r=3, theta_d_length=64),
}
LORA = {"LoRA": lambda r, **options: peft.LoraConfig(r=r, **options)}  # for which PEFT has such batches in evaluation
LINEAR_ONLY = {"DeLoRA", "BEFT", "OSF", "MiSS"}  # their PEFT layers take no Conv1D
PAIRS = [(name, kind) for name in CONFIGS for kind in ("llama", "gpt2") if kind != "gpt2" or name not in LINEAR_ONLY]
TRAINED = [pair for pair in PAIRS if METHODS[pair[0]].trains]


def build(zoo, name, kind, **options):
    """A model in evaluation with three adapters of random weights, one of them on some of the layers."""
    torch.manual_seed(0)
    base, targets = zoo.models[kind]()
    if kind == "gpt2" and name != "BEFT":
        options["fan_in_fan_out"] = True
    options["task_type"] = "FEATURE_EXTRACTION" if kind == "bert" else "CAUSAL_LM"
    config = (CONFIGS | LORA)[name]
    model = peft.get_peft_model(base, config(4, target_modules=targets, **options), adapter_name="first")
    model.add_adapter("second", config(5, target_modules=targets, **options))
    model.add_adapter("third", config(6, target_modules=targets[1:3], **options))
    for adapter in ADAPTERS:
        model.base_model.set_adapter(adapter)
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn(p.shape)
    return model.eval()


def layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]


def logits(model, inputs):
    """Each sequence by its adapter alone, in PEFT's own code."""
    rows = []
    for row, name in zip(inputs, NAMES, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(row[None]).logits)
        else:
            model.set_adapter(name)
            rows.append(model(row[None]).logits)
    return torch.cat(rows)


def trained(model):
    model.base_model.set_adapter(list(ADAPTERS))
    return model.train()


def test_every_tuner_is_here():
    own = {m.name for m in METHODS.values() if m.mixed and m.layer is not None and not m.variant}
    assert CONFIGS.keys() == own - {"LoRA"}


@pytest.mark.parametrize("name, kind", PAIRS)
def test_each_sequence_is_its_adapter_alone(zoo, fused_mixed, name, kind):
    model = build(zoo, name, kind)
    inputs = zoo.batch(kind, rows=len(NAMES))["input_ids"]
    stock, exact = logits(model, inputs), logits(zoo.copy(model).double(), inputs)
    assert not peftkern.accelerate(model).skipped
    model.set_adapter("first")
    ours = model(inputs, adapter_names=NAMES).logits
    zoo.as_accurate(ours, stock, exact)
    assert len(fused_mixed) == len(layers(model)) and peftkern.status(model).stock == 0
    # Without names nothing of them is left, and what a layer has not is the base layer itself.
    torch.testing.assert_close(model(inputs[:1]).logits, stock[:1], rtol=1e-4, atol=1e-4)
    fused_mixed.clear()
    with model.disable_adapter():
        base = model(inputs).logits
    assert all((y - b).abs().max() > 1e-3 for y, b, adapter in zip(ours, base, NAMES) if adapter != "__base__")
    assert torch.equal(model(inputs, adapter_names=["__base__"] * len(NAMES)).logits, base) and not fused_mixed
    third = model(inputs, adapter_names=["third"] * len(NAMES)).logits
    assert 0 < len(fused_mixed) < len(layers(model))
    torch.testing.assert_close(third[3:4], stock[3:4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, kind", TRAINED)
def test_gradients_are_those_of_each_adapter_alone(zoo, apart, fused_mixed, name, kind):
    model = build(zoo, name, kind)
    inputs = zoo.batch(kind, rows=len(NAMES))["input_ids"]
    stock, exact = (
        apart.gradients(zoo.copy(model), inputs, NAMES),
        apart.gradients(zoo.copy(model).double(), inputs, NAMES),
    )
    model = zoo.copy(model)  # as they are, without the hooks that OSF has on its tensors
    peftkern.accelerate(model)
    trained(model).zero_grad()
    apart.loss(model(inputs, adapter_names=NAMES).logits, NAMES).backward()
    ours = zoo.gradients(model)
    assert len(fused_mixed) == len(layers(model)) and peftkern.status(model).stock == 0
    assert ours.keys() == stock.keys() == exact.keys() and len(ours) >= 3
    scale = max(g.abs().max().item() for g in exact.values())
    for parameter in ours:
        assert exact[parameter].abs().max() > 0
        zoo.as_accurate(ours[parameter], stock[parameter], exact[parameter], scale)


@pytest.mark.parametrize("name", ["AdaLoRA", "VeRA", "(IA)^3"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_each_prompt_alone(zoo, fused_mixed, name, beams):
    model = build(zoo, name, "llama")
    inputs = zoo.batch("llama", rows=len(NAMES))["input_ids"]
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, num_beams=beams)
    alone = []
    for row, adapter in zip(inputs, NAMES, strict=True):
        if adapter == "__base__":
            with model.disable_adapter():
                alone.append(model.generate(row[None], **options)[0])
        else:
            model.set_adapter(adapter)
            alone.append(model.generate(row[None], **options)[0])
    peftkern.accelerate(model)
    together = model.generate(inputs, adapter_names=NAMES, **options)
    assert {len(ids) for _, ids in fused_mixed} == {beams * len(NAMES)} and len(fused_mixed) >= 5 * 10
    for row, expected in zip(together, alone, strict=True):
        assert torch.equal(row[: len(expected)], expected)


def test_beams_of_an_encoder_and_a_decoder(zoo, fused_mixed):
    config = zoo.transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    base = zoo.transformers.T5ForConditionalGeneration(config)
    settings = dict(target_modules=["q", "v", "wo"], feedforward_modules=["wo"], task_type="SEQ_2_SEQ_LM")
    model = peft.get_peft_model(base, peft.IA3Config(**settings), adapter_name="first")
    model.add_adapter("second", peft.IA3Config(**settings))
    for layer in layers(model):
        for vector in layer.ia3_l.values():
            nn.init.uniform_(vector, 0.5, 2.0)
    inputs = zoo.batch("llama", rows=3)["input_ids"]
    options, alone = dict(num_beams=2, max_new_tokens=5, do_sample=False), []
    for row, name in zip(inputs, ("second", "first", "first"), strict=True):
        model.set_adapter(name)
        alone.append(model.eval().generate(input_ids=row[None], **options)[0])
    peftkern.accelerate(model)
    together = model.generate(input_ids=inputs, adapter_names=["second", "first", "first"], **options)
    for row, expected in zip(together, alone, strict=True):
        assert torch.equal(row[: len(expected)], expected)
    assert {len(ids) for _, ids in fused_mixed} == {3, 6}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["AdaLoRA", "VeRA", "(IA)^3"])
def test_gradient_checkpointing(zoo, apart, fused_mixed, name, reentrant):
    dropout = {"AdaLoRA": {"lora_dropout": 0.3}, "VeRA": {"vera_dropout": 0.3}}.get(name, {})
    model = build(zoo, name, "llama", **dropout)
    peftkern.accelerate(model)
    inputs = zoo.batch("llama", rows=len(NAMES))["input_ids"]
    model = trained(model)

    def gradients():
        model.zero_grad()
        torch.manual_seed(4)
        apart.loss(model(inputs, adapter_names=NAMES).logits, NAMES).backward()
        return zoo.gradients(model)

    expected, calls = gradients(), len(fused_mixed)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.testing.assert_close(gradients(), expected)
    assert len(fused_mixed) == 3 * calls == 3 * len(layers(model))
    assert not any(m._forward_pre_hooks for m in layers(model))


def test_the_regulariser_of_adalora_is_untouched(zoo):
    model = build(zoo, "AdaLoRA", "llama")
    batch = zoo.batch("llama", rows=len(NAMES))
    stock, results = zoo.copy(model), []
    peftkern.accelerate(model)
    for m in (stock, model):
        trained(m).zero_grad()
        if m is model:
            m(**batch, adapter_names=NAMES).loss.backward()
        else:  # the loss of a batch is the mean of its sequences'
            for i, name in enumerate(NAMES):
                m.base_model.set_adapter([name] if name != "__base__" else [])
                m.base_model.set_requires_grad(ADAPTERS)
                row = {key: value[i : i + 1] for key, value in batch.items()}
                (m(**row).loss / len(NAMES)).backward()
        results.append(zoo.gradients(m))
    torch.testing.assert_close(results[1], {n: results[0][n] for n in results[1]}, rtol=1e-4, atol=1e-5)
    # It alone reaches lora_A of the trainable adapter that has no row.
    model.zero_grad()
    model(**batch, adapter_names=["__base__"] * len(NAMES)).loss.backward()
    assert {n.split(".")[-1] for n in zoo.gradients(model)} == {"first"}


@pytest.mark.parametrize("name", ["VeRA", "(IA)^3"])
def test_peft_drops_the_names_before_and_after(zoo, name):
    """Why a context of ours is there at all; whoever restores a model gets this back."""
    model = build(zoo, name, "llama")
    inputs = zoo.batch("llama", rows=len(NAMES))["input_ids"]
    model.set_adapter("second")
    ignored = model(inputs).logits
    assert torch.equal(model(inputs, adapter_names=NAMES).logits, ignored)
    assert torch.equal(model(inputs, adapter_names=["no such"]).logits, ignored)
    peftkern.accelerate(model)
    assert not torch.allclose(model(inputs, adapter_names=NAMES).logits, ignored)
    other = build(zoo, name, "llama")
    other.set_adapter("second")
    assert torch.equal(other(inputs, adapter_names=NAMES).logits, ignored)
    peftkern.restore(model)
    assert torch.equal(model(inputs, adapter_names=NAMES).logits, ignored)
    hf_peft.patch()
    assert not torch.allclose(other(inputs, adapter_names=NAMES).logits, ignored)


def test_the_classes_get_their_own_functions_back(monkeypatch):
    import weakref

    from peftkern.integrations.hf_peft import forward

    monkeypatch.setattr(forward.switch, "marks", weakref.WeakSet())
    forward.uninstall_if_unused()
    places = [
        (peft.tuners.tuners_utils.BaseTuner, "_enable_peft_forward_hooks"),
        (peft.tuners.lora.model.LoraModel, "_enable_peft_forward_hooks"),
        (peft.PeftMixedModel, "forward"),
        (peft.PeftMixedModel, "generate"),
    ]
    stock = [vars(cls).get(name) for cls, name in places]
    assert stock[0] is None and all(stock[1:])
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    )
    peftkern.accelerate(model)
    assert all(vars(cls)[name] is not own for (cls, name), own in zip(places, stock, strict=True))
    # Another library's, put on top, stays; ours below it passes on.
    own = peft.PeftMixedModel.generate
    on_top = functools.wraps(own)(lambda self, *args, **kwargs: own(self, *args, **kwargs))
    monkeypatch.setattr(peft.PeftMixedModel, "generate", on_top)
    peftkern.restore(model)
    monkeypatch.undo()
    peft.PeftMixedModel.generate = stock[3]
    assert [vars(cls).get(name) for cls, name in places[:3]] == stock[:3]


def test_bad_names_are_named(zoo):
    model = build(zoo, "VeRA", "llama")
    inputs = zoo.batch("llama", rows=2)["input_ids"]
    peftkern.accelerate(model)
    with pytest.raises(ValueError, match=r"non-existing adapter.*other"):
        model(inputs, adapter_names=["first", "other"])
    with pytest.raises(ValueError, match=r"non-existing adapter.*None, other"):
        model(inputs, adapter_names=[None, "other"])
    with pytest.raises(TypeError, match="expected a list of str"):
        model(inputs, adapter_names="first")
    for names in ([], ["__base__"] * 3):
        with pytest.raises(ValueError, match=f"adapter_names has {len(names)} entries, the input has shape"):
            model(inputs, adapter_names=names)
    with pytest.raises(ValueError, match="adapter_names has 3 entries, the input has shape"):
        model(inputs, adapter_names=["first"] * 3)
    model.set_adapter("first")
    first = layers(model)[0]
    first.merge()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names`: its adapters are merged"):
        model(inputs, adapter_names=["first", "third"])
    first.unmerge()
    handle = first.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names`: base_layer carries a hook"):
        model(inputs, adapter_names=["first", "second"])
    handle.remove()
    peftkern.restore(first)
    for training in (False, True):
        with pytest.raises(ValueError, match=r"Cannot pass `adapter_names`.*: .*q_proj is not accelerated"):
            model.train(training)(inputs, adapter_names=["first", "second"])
    assert not any(m._forward_pre_hooks for m in layers(model))
    assert model.training and model.base_model.training


def test_pvera_draws_samples_in_training(zoo):
    model = build(zoo, "PVeRA", "llama")
    peftkern.accelerate(model)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names`: PVeRA draws a sample"):
        model.train()(zoo.batch("llama", rows=2)["input_ids"], adapter_names=["first", "second"])


def test_saved_modules_take_names_too(zoo):
    model = build(zoo, "(IA)^3", "bert", modules_to_save=["classifier"])
    inputs = zoo.batch("bert", rows=len(NAMES))["input_ids"]
    for head in model.base_model.model.classifier.modules_to_save.values():
        nn.init.normal_(head.weight)
    expected = logits(model, inputs)
    peftkern.accelerate(model)
    torch.testing.assert_close(model(inputs, adapter_names=NAMES).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saving", ["first", "second"])
@pytest.mark.parametrize("name", ["VeRA", "LoRA"])
def test_an_adapter_without_a_saved_module_has_the_models(zoo, name, saving):
    model = build(zoo, name, "bert")
    model.delete_adapter(saving)
    targets = zoo.models["bert"]()[1]
    model.add_adapter(saving, (CONFIGS | LORA)[name](4, target_modules=targets, modules_to_save=["classifier"]))
    nn.init.normal_(model.base_model.model.classifier.modules_to_save[saving].weight)
    inputs = zoo.batch("bert", rows=len(NAMES))["input_ids"]
    expected = logits(model.eval(), inputs)
    peftkern.accelerate(model)
    for active in ADAPTERS:
        model.set_adapter(active)
        torch.testing.assert_close(model(inputs, adapter_names=NAMES).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["VeRA", "LoRA"])
def test_names_are_those_of_the_calling_thread(zoo, name):
    model = build(zoo, name, "llama")
    peftkern.accelerate(model)
    inputs = zoo.batch("llama", rows=2)["input_ids"]
    batches = [["first", "second"], ["second", "__base__"], None]
    expected = [model(inputs, adapter_names=names).logits for names in batches]
    inside, results = threading.Barrier(len(batches), timeout=60), [None] * len(batches)

    def meet(*args):
        inside.wait()  # all calls are under way, and each has its hooks in place

    handle = model.base_model.model.register_forward_pre_hook(meet)

    @torch.no_grad()
    def call(i):
        results[i] = model(inputs, adapter_names=batches[i]).logits

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    for ours, one in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, one)
