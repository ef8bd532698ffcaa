"""Folders as diffusers writes them (layout, spellings and settings as of 0.42): the models of one pipeline in one file."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkern
from peftkern.integrations.attach.weights import DIFFUSERS as FILES

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
DIFFUSERS, PICKLE = FILES
UNET = {"r": 4, "lora_alpha": 12, "target_modules": ["to_q", "to_out.0"], "rank_pattern": {"0.attn1.to_q": 6}}
TEXT = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "out_proj"], "use_rslora": True}


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(16, 16), nn.Dropout(0.0)])

    def forward(self, x):
        y = nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x))
        return self.to_out[0](y)


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1, self.proj = _Attention(), nn.Conv1d(16, 16, 1)

    def forward(self, x):
        return x + self.attn1(x)


class _Unet(nn.Module):
    """Names and kinds of a UNet's attention, with a convolution."""

    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.Sequential(_Block(), _Block())

    def forward(self, x):
        return self.transformer_blocks(x)


def unet():
    torch.manual_seed(0)
    return _Unet().eval()


def text_encoder():
    torch.manual_seed(0)
    config = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config, max_position_embeddings=16)).eval()


MODELS = {
    "unet": (unet, UNET, torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))),
    "text_encoder": (text_encoder, TEXT, torch.arange(10).view(2, 5)),
}


@torch.no_grad()
def run(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.last_hidden_state


def injected(name, options):
    """The model with a random adapter, injected as diffusers does it: there is no PeftModel around."""
    make, _, _ = MODELS[name]
    config = peft.LoraConfig(**options, init_lora_weights=False)
    torch.manual_seed(1)
    return peft.inject_adapter_in_model(config, make()).eval(), config


def spell(key, spelling):
    """The spellings of diffusers 0.22 and 0.16, made from PEFT's."""
    down = "down" if "lora_A" in key else "up"
    module = key.partition(".lora_")[0]
    text = ".self_attn." in module
    if spelling == "lora":
        return f"{module}.lora{'_linear_layer' * text}.{down}.weight"
    if spelling == "processor":
        block, _, last = module.replace(".to_out.0", ".to_out").rpartition(".")
        last = f"to_{last.partition('_')[0]}" if text else last
        return f"{block}{'' if text else '.processor'}.{last}_lora.{down}.weight"
    return key


def save(folder, names, spelling="peft", metadata=True, prefix=True):
    """A pipeline's file; without settings, diffusers reads every rank from it and takes alpha for the rank."""
    tensors, settings, models = {}, {}, {}
    for name in names:
        options = MODELS[name][1]
        if not metadata:
            options = {k: v for k, v in options.items() if k != "use_rslora"}
            options = {**options, "lora_alpha": options["r"], "alpha_pattern": options.get("rank_pattern", {})}
        models[name], config = injected(name, options)
        front = f"{name}." if prefix else ""
        for key, tensor in peft.get_peft_model_state_dict(models[name]).items():
            tensors[front + spell(key, spelling)] = tensor.contiguous()
        packed = config.to_dict()
        settings.update({front + k: list(v) if isinstance(v, set) else v for k, v in packed.items()})
    folder.mkdir(exist_ok=True)
    written = {"format": "pt", **({"lora_adapter_metadata": json.dumps(settings, indent=2)} if metadata else {})}
    save_file(tensors, folder / DIFFUSERS, written)
    return models


@pytest.mark.parametrize("metadata", [True, False], ids=["settings", "no settings"])
@pytest.mark.parametrize("spelling", ["peft", "lora", "processor"])
def test_every_model_of_a_pipeline_takes_its_part(tmp_path, spelling, metadata):
    stock = save(tmp_path / "a", MODELS, spelling, metadata)
    for name, (make, _, x) in MODELS.items():
        model = make()
        multi = peftkern.attach_adapters(model, {"a": tmp_path / "a"})
        assert len(multi.layers) == 4 and not multi.layers[0].startswith(name)
        with multi.use(["a", None]):
            ours = run(model, x)
        base, expected = run(model, x), run(stock[name], x)
        torch.testing.assert_close(ours, torch.stack([expected[0], base[1]]), rtol=1e-4, atol=1e-5)
        assert (ours[0] - base[0]).abs().max() > 0.05


def test_a_models_own_file_a_pickle_and_earlier_names(tmp_path):
    stock = save(tmp_path / "a", ["unet"], prefix=False)["unet"]
    model, x = unet(), MODELS["unet"][2]
    with peftkern.attach_adapters(model, {"a": tmp_path / "a"}).use(["a", "a"]):
        torch.testing.assert_close(run(model, x), run(stock, x), rtol=1e-4, atol=1e-5)
    stock = save(tmp_path / "p", ["unet"], "lora", metadata=False)["unet"]
    torch.save(load_file(tmp_path / "p" / DIFFUSERS), tmp_path / "p" / PICKLE)
    (tmp_path / "p" / DIFFUSERS).unlink()
    with peftkern.attach_adapters(model := unet(), {"p": tmp_path / "p"}).use(["p", "p"]):
        torch.testing.assert_close(run(model, x), run(stock, x), rtol=1e-4, atol=1e-5)
    # transformers 4 had one more level in its text encoders, and so have the files of that time.
    stock = save(tmp_path / "b", ["text_encoder"], "lora", metadata=False)["text_encoder"]
    file = tmp_path / "b" / DIFFUSERS
    save_file({k.replace(".encoder.", ".text_model.encoder."): t for k, t in load_file(file).items()}, file)
    model, x = text_encoder(), MODELS["text_encoder"][2]
    with peftkern.attach_adapters(model, {"b": tmp_path / "b"}).use(["b", "b"]):
        torch.testing.assert_close(run(model, x), run(stock, x), rtol=1e-4, atol=1e-5)


def _settings(**values):
    return lambda tensors, settings: settings.update(values)


def _twice(tensors, settings):
    for key in list(tensors):
        tensors[key.replace("unet.", "unet_2.")] = tensors[key].clone()
    settings.clear()


def _convolution(tensors, settings):
    tensors.update(
        {
            "unet.transformer_blocks.0.proj.lora_A.weight": torch.ones(4, 16),
            "unet.transformer_blocks.0.proj.lora_B.weight": torch.ones(16, 4),
        }
    )


def _other(tensors, settings):
    for key in list(tensors):
        tensors[key.replace("blocks.1.attn1", "blocks.7.attn1")] = tensors.pop(key)


REFUSED = {
    "DoRA": (_settings(**{"unet.use_dora": True}), ".lora_magnitude_vector: is missing"),
    "LoKr": (_settings(**{"unet.peft_type": "LOKR"}), "unet.peft_type: is 'LOKR'"),
    "another rank": (_settings(**{"unet.r": 5}), "but the config gives it rank 5"),
    "two models that fit": (_twice, "holds adapters for unet and unet_2, which all fit this model"),
    "a convolution": (_convolution, "transformer_blocks.0.proj is a torch.nn.modules.conv.Conv1d"),
    "another model": (_other, "the model has no module"),
    "kohya's keys": (lambda t, s: t.update(lora_unet_a_b=torch.ones(2)), "lora_unet_a_b: is written as kohya's"),
    "a control LoRA's": (
        lambda t, s: t.update({"unet.norm.down": torch.ones(2)}),
        "unet.norm.down: is no part of the adapter",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(tmp_path, case):
    change, text = REFUSED[case]
    save(tmp_path / "a", ["unet"])
    tensors, model = load_file(tmp_path / "a" / DIFFUSERS), unet()
    config = injected("unet", UNET)[1].to_dict()
    settings = {f"unet.{k}": list(v) if isinstance(v, set) else v for k, v in config.items()}
    change(tensors, settings)
    packed = {"lora_adapter_metadata": json.dumps(settings)} if settings else None
    save_file(tensors, tmp_path / "a" / DIFFUSERS, packed)
    before = copy.deepcopy(list(model.state_dict()))
    with pytest.raises(ValueError) as caught:
        peftkern.attach_adapters(model, {"a": tmp_path / "a"})
    assert str(tmp_path / "a" / DIFFUSERS) in str(caught.value) and text in str(caught.value), caught.value
    assert list(model.state_dict()) == before and not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("raw", ["{", "[]"])
def test_settings_that_are_none(tmp_path, raw):
    save(tmp_path / "a", ["unet"])
    save_file(load_file(tmp_path / "a" / DIFFUSERS), tmp_path / "a" / DIFFUSERS, {"lora_adapter_metadata": raw})
    with pytest.raises(ValueError, match=r"lora_adapter_metadata: (is no JSON|holds a list)"):
        peftkern.attach_adapters(unet(), {"a": tmp_path / "a"})
