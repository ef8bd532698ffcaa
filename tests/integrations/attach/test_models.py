"""Models and checkpoints in other states: renamed layers, accelerate's hooks, replaced or whole modules, fast paths."""

import copy
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkern
from peftkern.integrations.attach.checkpoint import Checkpoint
from peftkern.integrations.attach.weights import SAFETENSORS

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SMALL = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def under(multi, inputs, names=("one", "one")):
    with multi.use(list(names)):
        return logits(multi.model, inputs)


def save(model, folder, **options):
    """A random adapter of the model in the folder ``one``."""
    torch.manual_seed(7)
    options = {"r": 4, "lora_alpha": 12, "init_lora_weights": False, **options}
    twin = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
    twin.save_pretrained(folder / "one")
    return folder / "one"


def stock(model, folder, inputs):
    return logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder), inputs)


def rename(folder, *pairs):
    def new(key):
        for old, other in pairs:
            key = key.replace(old, other)
        return key

    save_file({new(key): t for key, t in load_file(folder / SAFETENSORS).items()}, folder / SAFETENSORS)


def llava():
    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    vision = transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4)
    config = dict(vision_config=vision, text_config=transformers.LlamaConfig(**SMALL), image_token_index=60)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**config)).eval()
    ids = torch.randint(0, 50, (2, 7))
    ids[:, 1:5] = 60
    return model, {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}


# transformers' names of LLaVA's layers in 5, 4.52 and 4.40: (tower, language model).
ERAS = {
    "now": (),
    "5.0": (("vision_tower.encoder", "vision_tower.vision_model.encoder"),),
    "4.52": (("vision_tower.encoder", "vision_tower.vision_model.encoder"),),
    "4.40": (
        ("model.vision_tower.encoder", "vision_tower.vision_model.encoder"),
        ("model.language_model.layers", "language_model.model.layers"),
    ),
}


@pytest.mark.parametrize("era", ERAS)
def test_layers_that_transformers_renamed(tmp_path, era):
    model, inputs = llava()
    folder = save(model, tmp_path, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.self_attn.q_proj": 3})
    expected = stock(model, folder, inputs)
    rename(folder, *ERAS[era])
    assert torch.equal(stock(model, folder, inputs), expected)
    multi = peftkern.attach_adapters(model, {"one": folder})
    torch.testing.assert_close(under(multi, inputs), expected, rtol=1e-4, atol=1e-5)
    assert len(multi.layers) == 8 and all(name in dict(model.named_modules()) for name in multi.layers)
    assert (expected - logits(model, inputs)).abs().max() > 0.05


def test_the_map_of_transformers_4(tmp_path, monkeypatch):
    model, inputs = llava()
    folder = save(model, tmp_path, target_modules=["q_proj", "v_proj"])
    expected = stock(model, folder, inputs)
    rename(folder, *ERAS["4.40"], ("vision_tower.vision_model", "vision_tower"))
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    with pytest.raises(ValueError, match="has no module 'language_model"):
        peftkern.attach_adapters(model, {"one": folder})
    pairs = {"^language_model.model": "model.language_model", "^vision_tower": "model.vision_tower", "^model": "none"}
    model._checkpoint_conversion_mapping = pairs
    multi = peftkern.attach_adapters(model, {"one": folder})
    torch.testing.assert_close(under(multi, inputs), expected, rtol=1e-4, atol=1e-5)


def test_patterns_mean_the_names_of_their_file(tmp_path):
    """Stock matches them with the model's names of today, so that a file's own full path means nothing there."""
    model, inputs = llava()
    key = "language_model.model.layers.0.self_attn.q_proj"
    folder = save(model, tmp_path, target_modules=["q_proj"], alpha_pattern={"model.language_model.layers.0.*": 80})
    expected = stock(model, folder, inputs)
    rename(folder, *ERAS["4.40"])
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace("model.language_model.layers.0.*", key))
    checkpoint = Checkpoint(folder)
    part, tensors = checkpoint.parts[key], dict(checkpoint.tensors())[key]
    assert part.method.stored.take(part.settings, part.module, tensors)[1] == (20,)
    multi = peftkern.attach_adapters(model, {"one": folder})
    torch.testing.assert_close(under(multi, inputs), expected, rtol=1e-4, atol=1e-5)


def test_experts_of_earlier_mixtral_checkpoints(tmp_path):
    """One linear layer per expert is a slice of a parameter today; the attention's adapters keep their names."""
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config).eval()
    folder = save(model, tmp_path, target_modules=["q_proj", "v_proj"])
    inputs = {"input_ids": torch.randint(0, 64, (2, 5))}
    multi = peftkern.attach_adapters(model, {"one": folder})
    torch.testing.assert_close(under(multi, inputs), stock(model, folder, inputs), rtol=1e-4, atol=1e-5)
    multi.detach()
    for w, (K, N) in {"w1": (16, 24), "w2": (24, 16)}.items():
        name = f"base_model.model.model.layers.1.block_sparse_moe.experts.1.{w}"
        new = {f"{name}.lora_A.weight": torch.ones(4, K), f"{name}.lora_B.weight": torch.ones(N, 4)}
        save_file({**load_file(folder / SAFETENSORS), **new}, folder / SAFETENSORS)
    with pytest.raises(ValueError, match=r"w1.lora_A.*: is of one expert, a slice .* of model.layers.1.mlp.experts:"):
        peftkern.attach_adapters(model, {"one": folder})


HOOKS = {
    "forced": lambda m: accelerate.dispatch_model(m, device_map={"": "cpu"}, force_hooks=True),
    "on the layers": lambda m: [accelerate.hooks.add_hook_to_module(x, _Doubles()) for x in _linears(m)],
    "two on a layer": lambda m: [
        accelerate.hooks.add_hook_to_module(x, _Doubles(), append=True) for _ in range(2) for x in _linears(m)
    ],
    "offloaded": lambda m: accelerate.cpu_offload(m, execution_device="cpu"),
}


class _Doubles(accelerate.hooks.ModelHook):
    def post_forward(self, module, output):
        return 2 * output


def _linears(model):
    """The layers, those with an adapter inside as a whole."""
    layers = [
        m for n, m in model.named_modules() if type(m) is nn.Linear and "base_layer" not in n and "lora_" not in n
    ]
    return layers + [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]


def _hooks(model):
    return {name: m._hf_hook for name, m in model.named_modules() if hasattr(m, "_hf_hook")}


@pytest.mark.parametrize("hooks", HOOKS)
def test_accelerates_hooks(zoo, tmp_path, hooks):
    twin = zoo.several("llama", one={"r": 4}, two={"r": 6})
    twin.save_pretrained(tmp_path)
    inputs = {"input_ids": zoo.batch("llama", rows=3)["input_ids"]}
    plain = zoo.copy(twin).unload().eval()
    HOOKS[hooks](plain)
    HOOKS[hooks](twin)
    before, base = _hooks(plain), logits(plain, inputs)
    multi = peftkern.attach_adapters(plain, {name: tmp_path / name for name in ("one", "two")})
    ours = under(multi, inputs, ("one", None, "two"))
    expected = torch.stack([logits(twin, inputs)[0], base[1], base[2]])
    twin.set_adapter("two")
    expected[2] = logits(twin, inputs)[2]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert (ours - base).abs().amax((1, 2)).gt(0.05).tolist() == [True, False, True]
    assert _hooks(plain) == before and torch.equal(logits(plain, inputs), base)
    if hooks != "offloaded":  # a copy of an offloaded model has no weights: accelerate's hooks stay with the first
        assert torch.equal(logits(copy.deepcopy(plain), inputs), base)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="call attach_adapters"):
            attempt(multi)
    multi.detach()
    assert _hooks(plain) == before and torch.equal(logits(plain, inputs), base)
    assert not any("Attached" in str(vars(m).get("_old_forward")) for m in plain.modules())


def test_hooks_that_come_and_go_while_adapters_are_attached(zoo, tmp_path):
    twin = zoo.several("llama", one={"r": 4})
    twin.save_pretrained(tmp_path)
    inputs = {"input_ids": zoo.batch("llama", rows=2)["input_ids"]}
    plain = twin.unload().eval()
    base = logits(plain, inputs)
    multi = peftkern.attach_adapters(plain, {"one": tmp_path / "one"})
    expected = under(multi, inputs)
    HOOKS["forced"](plain)
    assert torch.equal(under(multi, inputs), expected)
    multi.detach()
    assert torch.equal(logits(plain, inputs), base)
    multi = peftkern.attach_adapters(plain, {"one": tmp_path / "one"})
    accelerate.hooks.remove_hook_from_submodules(plain)
    assert torch.equal(under(multi, inputs), expected)
    multi.detach()
    assert torch.equal(logits(plain, inputs), base)


def _resize(model):
    model.resize_token_embeddings(70)


def _head(model):
    model.lm_head = nn.Linear(32, 64, bias=False)


def _block(model):
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])


@pytest.mark.parametrize(
    ("replace", "tied", "text"),
    [
        (_resize, False, "LlamaForCausalLM.lm_head was replaced"),
        (_resize, True, r"weight has shape \(70, 32\), expected \(N, K\) = \(64, 32\)"),
        (_head, False, "LlamaForCausalLM.lm_head was replaced"),
        (_block, False, "ModuleList.1 was replaced"),
    ],
)
def test_a_layer_that_was_replaced_since(tmp_path, replace, tied, text):
    """Stock raises a TypeError when a head with an adapter is resized; here the model can be resized, not used."""
    config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 32}, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).eval()
    folder = save(model, tmp_path, target_modules=["lm_head", "q_proj"])
    if replace is _resize:
        with pytest.raises((TypeError, KeyError)):
            replace(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder))
    inputs = {"input_ids": torch.randint(0, 64, (2, 5))}
    multi = peftkern.attach_adapters(model, {"one": folder})
    torch.testing.assert_close(under(multi, inputs), stock(copy.deepcopy(model), folder, inputs), rtol=1e-4, atol=1e-5)
    replace(model)
    with pytest.raises((RuntimeError, ValueError), match=text):
        under(multi, inputs)
    multi.detach()
    if replace is _block:
        expected = stock(model, folder, inputs)
        multi = peftkern.attach_adapters(model, {"one": folder})
        torch.testing.assert_close(under(multi, inputs), expected, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=r"lm_head\S*: (has shape|differs from the model's)"):
            peftkern.attach_adapters(model, {"one": folder})


class _Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.out = nn.Linear(16, 8)

    def forward(self, x):
        return self.out(self.layer(x))


@torch.no_grad()
def test_fast_paths_that_never_call_the_layer(tmp_path):
    """In stock such an adapter has no effect in evaluation, without a word."""
    model, x = _Encoder().eval().requires_grad_(False), torch.randn(2, 5, 16)
    folder = save(model, tmp_path, target_modules=["linear1"])
    assert torch.equal(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)(x), model(x))
    with pytest.raises(ValueError, match=r"layer.linear1 belongs to a torch.nn.TransformerEncoderLayer"):
        peftkern.attach_adapters(model, {"one": folder})
    folder = save(model, tmp_path, target_modules=["out"])
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)(x)
    with peftkern.attach_adapters(model, {"one": folder}).use(["one", "one"]):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


class _Borrowing(nn.Module):
    """Takes the weights of ``q`` and ``k`` without a call; ``k`` is also called, ``v`` only."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        taken = (nn.functional.linear(x, weight, self.q.bias) for weight in (self.q.weight, self.k.weight))
        return sum(taken) + self.rest(x)

    def rest(self, x):
        return (lambda y: self.k(y))(self.v(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wavlm", "mamba", "own"])
def test_layers_whose_weight_is_taken_and_that_are_never_called(tmp_path, kind):
    """Stock has no effect there either, and no gradient."""
    torch.manual_seed(0)
    if kind == "own":
        model, inputs, good, bad, where = _Borrowing(), {"x": torch.randn(2, 16)}, ["v", "k"], "q", "q"
    elif kind == "mamba":
        config = transformers.MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1)
        model, inputs = transformers.MambaModel(config), {"input_ids": torch.randint(0, 64, (2, 5))}
        good, bad, where = ["in_proj"], "dt_proj", "layers.0.mixer.dt_proj"
    else:
        conv = dict(conv_dim=(8,), conv_kernel=(4,), conv_stride=(4,), num_conv_pos_embeddings=4)
        config = transformers.WavLMConfig(
            **{**SMALL, "num_hidden_layers": 1}, **conv, num_feat_extract_layers=1, num_conv_pos_embedding_groups=2
        )
        model, inputs = transformers.WavLMModel(config), {"input_values": torch.randn(2, 100)}
        good, bad, where = ["intermediate_dense"], "q_proj", "encoder.layers.0.attention.q_proj"
    model.eval()
    run = (lambda m: m(**inputs)) if kind == "own" else (lambda m: m(**inputs).last_hidden_state)
    folder = save(model, tmp_path, target_modules=[bad])
    torch.testing.assert_close(run(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)), run(model))
    with pytest.raises(ValueError, match=rf"{where} is never called: \S+ takes its weight"):
        peftkern.attach_adapters(model, {"one": folder})
    folder = save(model, tmp_path, target_modules=good)
    expected = run(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder))
    assert (expected - run(model)).abs().max() > 1e-3
    with peftkern.attach_adapters(model, {"one": folder}).use(["one", "one"]):
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


def _classifier(kind, **options):
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**SMALL, num_labels=3, pad_token_id=0)
        return transformers.LlamaForSequenceClassification(config).eval()
    config = transformers.BertConfig(**SMALL, num_labels=3)
    return (transformers.BertForSequenceClassification if kind == "bert" else transformers.BertForTokenClassification)(
        config
    ).eval()


@pytest.mark.parametrize(
    ("kind", "head", "targets"),
    [("llama", "score", ["q_proj"]), ("bert", "classifier", ["query"]), ("token", "classifier", ["query"])],
)
def test_heads_of_their_own(tmp_path, kind, head, targets):
    """An adapter with a head is served where the model has that head; any other is refused by the head's name."""
    model = _classifier(kind)
    task = {"token": "TOKEN_CLS"}.get(kind, "SEQ_CLS")
    folder = save(model, tmp_path, target_modules=targets, task_type=task)
    inputs = {"input_ids": torch.randint(1, 64, (2, 5))}
    multi = peftkern.attach_adapters(model, {"one": folder})
    torch.testing.assert_close(under(multi, inputs), stock(model, folder, inputs), rtol=1e-4, atol=1e-5)
    multi.detach()
    with torch.no_grad():
        next(m for n, m in model.named_modules() if n.endswith(head)).weight[0, 0] += 1
    with pytest.raises(ValueError, match=rf"{head}.weight: differs from the model's {head}.weight.*load it into"):
        peftkern.attach_adapters(model, {"one": folder})
    whole = {key: t for key, t in load_file(folder / SAFETENSORS).items() if head not in key}
    save_file(whole, folder / SAFETENSORS)
    with pytest.raises(ValueError, match=rf"{head}.weight: is missing, though modules_to_save names it"):
        peftkern.attach_adapters(model, {"one": folder})
