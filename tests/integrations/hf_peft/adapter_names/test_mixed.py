"""``adapter_names`` batches of accelerated models in evaluation: PEFT's results, one fused call per layer, one route."""

import functools

import pytest
import torch
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern.integrations import hf_peft

NAMES = ["first", "__base__", "second", "third", "first", "second"]
KINDS = ["llama", "qwen2", "bert", "gpt2"]


class Routes(TorchDispatchMode):
    """Counts how often the rows of a batch are sorted by adapter."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.peftkern.multi_lora_linear_route.default
        return func(*args, **(kwargs or {}))


def output(model, kind, zoo, **options):
    inputs = zoo.batch(kind, rows=len(NAMES))
    del inputs["labels"]
    result = model(**inputs, **options)
    return result[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_peft(zoo, fused_mixed, kind):
    model = zoo.several(kind)
    stock = output(model, kind, zoo, adapter_names=NAMES)
    exact = output(zoo.copy(model).double(), kind, zoo, adapter_names=NAMES)
    base = output(model, kind, zoo, adapter_names=["__base__"] * len(NAMES))
    assert (stock - base).abs().max() > 1e-2
    report = peftkern.accelerate(model)
    assert not report.skipped
    ours = output(model, kind, zoo, adapter_names=NAMES)
    assert len(fused_mixed) == len(zoo.lora_layers(model))
    zoo.as_accurate(ours, stock, exact)
    # A layer, or a batch, without any of the adapters runs the base layer itself.
    fused_mixed.clear()
    assert torch.equal(output(model, kind, zoo, adapter_names=["__base__"] * len(NAMES)), base) and not fused_mixed
    output(model, kind, zoo, adapter_names=["third"] * len(NAMES))
    assert 0 < len(fused_mixed) < len(zoo.lora_layers(model))


def test_rows_do_not_depend_on_their_neighbours(zoo):
    model = zoo.several("llama")
    peftkern.accelerate(model)
    inputs = zoo.batch("llama", rows=len(NAMES))["input_ids"]
    together = model(inputs, adapter_names=NAMES).logits
    for i, name in enumerate(NAMES):
        alone = model(inputs[i : i + 1], adapter_names=[name]).logits
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


def test_layers_share_one_route(zoo, fused_mixed):
    model = zoo.several("llama", one={"r": 4}, two={"r": 7, "use_rslora": True})
    peftkern.accelerate(model)
    inputs = zoo.batch("llama", rows=3)["input_ids"]
    names = ["two", "one", "__base__"]
    with Routes() as routes, torch.no_grad():
        model(inputs, adapter_names=names)
        assert routes.count == 1 and len(fused_mixed) == 12
        assert len({id(ids) for _, ids in fused_mixed}) == 1
        # A list that changed in place is another batch.
        names[0] = "one"
        changed = model(inputs, adapter_names=names).logits
        assert routes.count == 2
    torch.testing.assert_close(changed, model(inputs, adapter_names=["one", "one", "__base__"]).logits)


def test_generation_routes_once_for_all_tokens(zoo):
    model = zoo.several("llama", one={"r": 4}, two={"r": 7})
    peftkern.accelerate(model)
    inputs = zoo.batch("llama", rows=2)["input_ids"]
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    with Routes() as routes:
        model.generate(inputs, adapter_names=["two", "one"], **options)
    assert routes.count == 2  # the prompt's rows, and one row per sequence


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_generation_equals_each_prompt_alone(zoo, fused_mixed, kind):
    model = zoo.several(kind)
    inputs = zoo.batch(kind, rows=len(NAMES))["input_ids"]
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    alone = []
    for row, name in zip(inputs, NAMES):
        row = {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
        if name == "__base__":
            with model.disable_adapter():
                alone.append(model.generate(**row, **options)[0])
        else:
            model.set_adapter(name)
            alone.append(model.generate(**row, **options)[0])
    peftkern.accelerate(model)
    mask = torch.ones_like(inputs)
    together = model.generate(input_ids=inputs, attention_mask=mask, adapter_names=NAMES, **options)
    assert len(fused_mixed) >= 8 * 12
    assert len({tuple(row.tolist()) for row in alone}) == len(NAMES)
    for row, expected in zip(together, alone):
        assert torch.equal(row[: len(expected)], expected)


def test_beams_repeat_the_names(zoo, fused_mixed):
    if Version(zoo.peft.__version__) < Version("0.19"):
        pytest.skip("PEFT 0.18 takes a decoder of transformers 5 for an encoder, and does not repeat the names")
    model = zoo.several("llama")
    inputs = zoo.batch("llama", rows=len(NAMES))["input_ids"]
    options = dict(adapter_names=NAMES, num_beams=3, max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = model.generate(inputs, **options)
    peftkern.accelerate(model)
    assert torch.equal(model.generate(inputs, **options), expected)
    assert all(len(ids) == 3 * len(NAMES) for _, ids in fused_mixed)
    assert len(fused_mixed) >= 5 * 12


def test_encoder_and_decoder(zoo, fused_mixed):
    config = zoo.transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    base = zoo.transformers.T5ForConditionalGeneration(config)
    settings = dict(target_modules=["q", "v", "wo"], init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
    model = zoo.peft.get_peft_model(base, zoo.peft.LoraConfig(**settings), adapter_name="first")
    model.add_adapter("second", zoo.peft.LoraConfig(r=3, **settings))
    zoo.randomise(model, scale=0.1).eval()
    options = dict(
        input_ids=zoo.batch("llama", rows=3)["input_ids"], adapter_names=["second", "__base__", "first"], num_beams=2,
        max_new_tokens=5, do_sample=False,
    )  # fmt: skip
    expected = model.generate(**options)
    peftkern.accelerate(model)
    assert torch.equal(model.generate(**options), expected)
    assert {len(ids) for _, ids in fused_mixed} == {3, 6}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("adapters", ["fp32", "same"])
def test_dtypes(zoo, fused_mixed, dtype, adapters):
    model, layer = zoo.layer(dtype=dtype, r=5)
    model.add_adapter("b", zoo.peft.LoraConfig(target_modules=["0"], r=3, lora_bias=True))
    zoo.randomise(model)
    if adapters == "same":
        model.to(dtype)
    names = ["b", "default", "__base__"]
    x = torch.randn(3, 6, 24, dtype=dtype)
    stock = layer(x, adapter_names=names)
    exact = zoo.copy(layer).double()(x.double(), adapter_names=names)
    peftkern.accelerate(model)
    ours = layer(x, adapter_names=names)
    assert len(fused_mixed) == 1
    zoo.as_accurate(ours, stock, exact)


def test_autocast(zoo, fused_mixed):
    model, layer = zoo.layer()
    x = torch.randn(3, 6, 24)
    names = ["default", "__base__", "default"]
    exact = zoo.copy(layer).double()(x.double(), adapter_names=names)
    with torch.autocast("cpu", torch.bfloat16):
        stock = layer(x, adapter_names=names)
        peftkern.accelerate(model)
        ours = layer(x, adapter_names=names)
    assert len(fused_mixed) == 1 and ours.dtype == torch.bfloat16
    zoo.as_accurate(ours, stock, exact)


def test_shapes_of_the_input(zoo, fused_mixed):
    model, layer = zoo.layer()
    names = ["default", "__base__", "default"]
    xs = [torch.randn(shape) for shape in [(3, 24), (3, 1, 24), (3, 4, 5, 24), (3, 0, 24)]]
    xs.append(torch.randn(3, 5, 48)[:, :, ::2])
    stock = [layer(x, adapter_names=names) for x in xs]
    peftkern.accelerate(model)
    for x, y in zip(xs, stock):
        torch.testing.assert_close(layer(x, adapter_names=names), y, rtol=1e-5, atol=1e-5)
    assert len(fused_mixed) == len(xs)
    assert torch.equal(layer(xs[0], adapter_names=tuple(names)), layer(xs[0], adapter_names=names))


def test_scalings_change_between_calls(zoo, fused_mixed):
    model, layer = zoo.layer()
    names = ["default", "__base__", "default"]
    x = torch.randn(3, 6, 24)
    twin = zoo.copy(layer)
    peftkern.accelerate(model)
    for change in (
        lambda m: m.scale_layer(2.0),
        lambda m: m.set_scale("default", 0.3),
        lambda m: m.scaling.update(default=torch.tensor(1.7)),
        lambda m: m.scaling.update(default=3),
    ):
        change(layer), change(twin)
        torch.testing.assert_close(layer(x, adapter_names=names), twin(x, adapter_names=names), rtol=1e-5, atol=1e-5)
    assert len(fused_mixed) == 4


def _bad_length(model, layer):
    return ["default"] * 4


def _unknown(model, layer):
    return "default"


def _merged(model, layer):
    layer.merge()
    return ["default"] * 3


ERRORS = {"too many names": _bad_length, "merged": _merged, "a string": _unknown}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_calls_raise_what_peft_raises(zoo, case):
    model, layer = zoo.layer()
    names = ERRORS[case](model, layer)
    messages = []
    for _ in range(2):
        with pytest.raises(Exception) as caught:
            layer(torch.randn(3, 24), adapter_names=names)
        messages.append((caught.type, str(caught.value)))
        peftkern.accelerate(model)
    assert messages[0] == messages[1]


def test_what_a_batch_may_not_have(zoo):
    velora = zoo.peft.VeloraConfig(num_groups=4)
    model = zoo.several("llama", plain={}, velora={"velora_config": velora})
    peftkern.accelerate(model)
    inputs = zoo.batch("llama")["input_ids"]
    with pytest.raises(ValueError, match=r"non-existing adapter.*other"):
        model(inputs, adapter_names=["plain", "other", "plain"])
    layer = next(iter(zoo.lora_layers(model).values()))
    x = torch.randn(2, 3, 32)
    assert "'velora' is a LoRA variant" in hf_peft.why_not(layer, x, ["plain", "velora"])
    assert hf_peft.why_not(layer, x, ["plain", "__base__"]) is None
    assert "adapter_names has 3 entries" in hf_peft.why_not(layer, x, ["plain"] * 3)
    assert hf_peft.why_not(layer, x, ["__base__"] * 2) == "it has no adapter of the batch"


def test_a_batch_with_a_dora_adapter_that_it_does_not_use(zoo, fused_mixed):
    model = zoo.several("llama", plain={}, other={"r": 2}, dora={"use_dora": True})
    inputs = zoo.batch("llama")["input_ids"]
    names = ["plain", "__base__", "other"]
    expected = model(inputs, adapter_names=names).logits
    peftkern.accelerate(model)
    torch.testing.assert_close(model(inputs, adapter_names=names).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(fused_mixed) == 12


def test_what_is_not_covered_runs_peft(zoo, fused_mixed):
    names = ["default", "__base__", "default"]
    x = torch.randn(3, 6, 24)
    for change in (
        lambda m: m.lora_A["default"].register_forward_hook(lambda m, a, y: 2 * y),
        lambda m: m.base_layer.weight.requires_grad_(True),
        lambda m: m.enable_adapters(False),
    ):
        model, layer = zoo.layer()
        change(layer)
        expected = layer(x, adapter_names=names)
        peftkern.accelerate(model)
        assert torch.equal(layer(x, adapter_names=names), expected) and not fused_mixed
        assert hf_peft.why_not(layer, x, names)


def test_layers_with_other_adapters_and_embeddings(zoo, fused_mixed):
    # An embedding's adapter runs PEFT's own code in the same batch.
    torch.manual_seed(0)
    base, _ = zoo.models["llama"]()
    targets = ["embed_tokens", "q_proj"]
    model = zoo.peft.get_peft_model(base, zoo.peft.LoraConfig(target_modules=targets), adapter_name="first")
    model.add_adapter("second", zoo.peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    zoo.randomise(model, scale=0.1).eval()
    inputs = zoo.batch("llama")["input_ids"]
    names = ["second", "first", "__base__"]
    expected = model(inputs, adapter_names=names).logits
    peftkern.accelerate(model)
    torch.testing.assert_close(model(inputs, adapter_names=names).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(fused_mixed) == 4


def test_patch_and_restore(zoo, fused_mixed):
    model, layer = zoo.layer()
    run = functools.partial(layer, torch.randn(2, 3, 24), adapter_names=["default", "__base__"])
    expected = run()
    hf_peft.patch()
    torch.testing.assert_close(run(), expected)
    hf_peft.unpatch()
    assert torch.equal(run(), expected) and len(fused_mixed) == 1
    peftkern.accelerate(model)
    run()
    peftkern.restore(model)
    assert torch.equal(run(), expected) and len(fused_mixed) == 2


def test_compiled(zoo):
    model, layer = zoo.layer(r=3)
    model.add_adapter("b", zoo.peft.LoraConfig(target_modules=["0"], r=5))
    zoo.randomise(model)
    peftkern.accelerate(model)
    names = ["b", "default", "__base__"]
    x = torch.randn(3, 4, 24)
    compiled = torch.compile(lambda t: layer(t, adapter_names=names), fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x, adapter_names=names), rtol=1e-5, atol=1e-5)


def test_adapters_that_change_between_calls(zoo, fused_mixed):
    """Layers keep the table of their adapters: what is trained, replaced, cast or loaded must be seen by the next call."""
    model = zoo.several("llama")
    stock = zoo.several("llama")
    peftkern.accelerate(model)
    inputs = zoo.batch("llama", rows=len(NAMES))

    def in_place(m):
        for p in m.parameters():
            p.data.mul_(1.25)

    def replaced(m):
        for layer in zoo.lora_layers(m).values():
            linear = layer.lora_A["first"]
            linear.weight = torch.nn.Parameter(linear.weight.detach() * 2)
            layer.scaling["first"] = 0.75

    def cast(m):
        m.double()

    def back(m):
        m.float()

    def removed(m):
        m.delete_adapter("second")
        m.add_adapter("second", zoo.peft.LoraConfig(r=5, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        zoo.randomise(m, seed=9, scale=0.1).eval()
        peftkern.accelerate(m) if m is model else None

    seen = []
    for change in (lambda m: None, in_place, replaced, cast, back, removed):
        for m in (model, stock):
            change(m)
        with torch.no_grad():
            found, expected = (m(**inputs, adapter_names=NAMES).logits for m in (model, stock))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        seen.append(found)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert len(fused_mixed) >= 5 * 12


@pytest.mark.parametrize("failing", ["input", "hook", "names"])
@torch.no_grad()
def test_a_batch_that_failed_leaves_no_names_behind(zoo, failing):
    model = zoo.several("llama")
    inputs = zoo.batch("llama", rows=2)["input_ids"]
    model.set_adapter("first")
    expected = model(inputs).logits
    peftkern.accelerate(model)
    hooked = model.base_model.model.model.layers[1].mlp
    names = ["second", "third"]
    if failing == "hook":
        handle = hooked.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="stop"):
            model(inputs, adapter_names=names)
        handle.remove()
    else:
        with pytest.raises((IndexError, ValueError)):
            model(inputs + 10**6 * (failing == "input"), adapter_names=names + ["third"] * (failing == "names"))
    torch.testing.assert_close(model(inputs).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(inputs[:1]).logits, expected[:1], rtol=1e-4, atol=1e-5)
