"""Folders that stock PEFT loads are served, with what stock computes; what would be served wrongly is refused."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftkern
from peftkern.integrations.attach.checkpoint import CONFIG, Checkpoint
from peftkern.integrations.attach.config import IGNORED, READ
from peftkern.integrations.attach.weights import PICKLE, SAFETENSORS
from peftkern.methods.registry import METHODS

peft = pytest.importorskip("peft")
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def stock(zoo, plain, folder, inputs):
    """What PEFT computes with this folder, loaded under its default name."""
    model = peft.PeftModel.from_pretrained(zoo.copy(plain), folder)
    with torch.no_grad():
        return model(inputs).logits


def ours(plain, folder, inputs):
    multi = peftkern.attach_adapters(plain, {"one": folder})
    with multi.use(["one"] * len(inputs)), torch.no_grad():
        logits = plain(inputs).logits
    multi.detach()
    return logits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models and folders by their options, made once."""
    return {}, tmp_path_factory.mktemp("adapters")


@pytest.fixture
def saved(zoo, tmp_path, made):
    """(plain model, folder, inputs) of an adapter with options; rank and alpha are PEFT's defaults."""

    def make(**options):
        models, folder = made
        key = repr(options)
        if key not in models:
            twin = zoo.several("llama", one={"r": 8, "lora_alpha": 8, **options})
            twin.save_pretrained(folder / str(len(models)))
            models[key] = twin.unload().eval(), folder / str(len(models)) / "one"
        plain, source = models[key]
        return plain, shutil.copytree(source, tmp_path / "one"), zoo.batch("llama", rows=2)["input_ids"]

    return make


def config(folder, delete=(), **values):
    settings = {k: v for k, v in json.loads((folder / CONFIG).read_text()).items() if k not in delete}
    (folder / CONFIG).write_text(json.dumps({**settings, **values}))


def tensors(folder, change):
    new = change(load_file(folder / SAFETENSORS))
    save_file({key: tensor.contiguous() for key, tensor in new.items()}, folder / SAFETENSORS)


def to_pickle(folder, cast=lambda tensor: tensor, **options):
    torch.save({k: cast(t) for k, t in load_file(folder / SAFETENSORS).items()}, folder / PICKLE, **options)
    (folder / SAFETENSORS).unlink()


def cast(dtype):
    return lambda folder: tensors(folder, lambda t: {key: value.to(dtype) for key, value in t.items()})


# What stock PEFT loads without an error.
LOADED = {
    "pickle": to_pickle,
    "pickle of the old kind": lambda f: to_pickle(f, _use_new_zipfile_serialization=False),
    "pickle of fp8": lambda f: to_pickle(f, lambda t: t.to(torch.float8_e4m3fnuz)),
    "e4m3": cast(torch.float8_e4m3fn),
    "e5m2": cast(torch.float8_e5m2),
    "fp16": cast(torch.float16),
    "no rank, no alpha": lambda f: config(f, delete=("r", "lora_alpha")),
    "no settings but the method": lambda f: config(
        f, delete=json.loads((f / CONFIG).read_text()).keys() - {"peft_type", "target_modules"}
    ),
    "PEFT 0.1": lambda f: config(f, merge_weights=True, enable_lora=None, delete=("peft_version",)),
    "bookkeeping": lambda f: config(f, trained_by="me", steps=100, losses=[1.0, 0.5], run={"id": 3}, final=True),
    "bookkeeping of a later PEFT": lambda f: config(f, peft_version="0.99.1", trained_by="me", steps=100, use_it=False),
    "settings of later PEFT, empty": lambda f: config(f, peft_version="1.0", use_new=None, new_config={}, blocks=[]),
    "the adapter's name in the keys": lambda f: tensors(
        f, lambda t: {key.replace(".weight", ".default.weight"): value for key, value in t.items()}
    ),
}


@pytest.mark.parametrize("case", LOADED)
def test_loads_as_stock_does(zoo, saved, case):
    plain, folder, inputs = saved()
    LOADED[case](folder)
    expected = stock(zoo, plain, folder, inputs)
    assert (expected - plain(inputs).logits).abs().max() > 0.1
    torch.testing.assert_close(ours(plain, folder, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"velora_config": {}},
        {"monteclora_config": {}},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "eva"},
        {"use_rslora": True, "lora_bias": False, "layers_to_transform": [0]},
    ],
    ids=str,
)
def test_what_matters_in_training_alone_loads(zoo, saved, options):
    options = dict(options)
    for name, cls in (("velora_config", peft.tuners.lora.config.VeloraConfig), ("monteclora_config", None)):
        if name in options:
            options[name] = (cls or peft.tuners.lora.config.MontecloraConfig)(**options[name])
    plain, folder, inputs = saved(**options)
    expected = stock(zoo, plain, folder, inputs)
    torch.testing.assert_close(ours(plain, folder, inputs), expected, rtol=1e-4, atol=1e-5)


def test_layers_that_the_file_leaves_out(zoo, saved):
    plain, folder, inputs = saved()
    tensors(folder, lambda t: {key: value for key, value in t.items() if ".layers.0." not in key})
    config(folder, init_lora_weights=True)
    expected = stock(zoo, plain, folder, inputs)
    with pytest.warns(UserWarning, match=r"holds nothing for 6 layers .*\(model\.layers\.0\.self_attn\.q_proj, \.\.\."):
        actual = ours(plain, folder, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


STORED = {method.name: method for method in METHODS.values() if method.stored is not None}


@pytest.mark.parametrize("name", STORED)
def test_every_setting_of_pefts_is_judged(name):
    """A setting of a new release must be sorted: what it changes, or why it can be ignored."""
    stored, cls = STORED[name].stored, peft.PEFT_TYPE_TO_CONFIG_MAPPING[STORED[name].peft_type]
    fields = set(cls.__dataclass_fields__)
    if issubclass(cls, peft.LoraConfig):
        fields |= {"merge_weights", "enable_lora", "lora_dtype"}
    sets = READ, IGNORED, set(stored.reads), set(stored.ignores), set(stored.changes)
    assert fields - {"bias", "exclude_modules", "layers_pattern", "layers_to_transform"} <= set().union(*sets)
    assert set().union(*sets[2:]) <= fields
    assert not any(a & b for i, a in enumerate(sets) for b in sets[:i])
    variants = {n for n, f in cls.__dataclass_fields__.items() if f.metadata.get("is_lora_variant")}
    if name in ("LoRA", "DoRA"):
        assert variants - stored.changes.keys() == {"use_dora", "velora_config", "monteclora_config"}


MEANS = {
    "arrow_config": {"top_k": 2},
    "kasa_config": {},
    "use_bdlora": {"nblocks": 2},
    "alora_invocation_tokens": [3, 4],
    "use_qalora": True,
    "trainable_token_indices": [1],
    "layer_replication": [[0, 2], [1, 2]],
    "megatron_config": {"hidden": 3},
    "enable_lora": [True, False, True],
    "use_next": True,
    "next_config": {"a": 1},
    "lora_next": "x",
}


@pytest.mark.parametrize("key", MEANS)
def test_unknown_meaning_is_refused_by_name(saved, key):
    plain, folder, _ = saved()
    config(folder, **{key: MEANS[key]})
    with pytest.raises(ValueError, match=rf"{CONFIG}: {key}: is "):
        peftkern.attach_adapters(plain, {"one": folder})


@pytest.mark.parametrize("value", [True, [1, 2], {"a": 1}], ids=str)
def test_a_later_release_may_mean_something_by_any_name(saved, value):
    plain, folder, _ = saved()
    config(folder, gating=value)
    Checkpoint(folder)
    config(folder, peft_version="0.22.0", gating=value)
    with pytest.raises(ValueError, match=r"gating: is .* \(written by PEFT 0.22.0\)"):
        peftkern.attach_adapters(plain, {"one": folder})


def test_an_arrow_router_folder(zoo, tmp_path):
    """Two experts and a router, as PEFT makes them: the router's folder has the weights of a plain adapter."""
    torch.manual_seed(0)
    plain, targets = zoo.models["llama"]()
    for name in ("e1", "e2"):
        model = peft.get_peft_model(
            zoo.copy(plain), peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        )
        model.save_pretrained(tmp_path / name)
    arrow = peft.tuners.lora.create_arrow_model(
        zoo.copy(plain), [str(tmp_path / "e1"), str(tmp_path / "e2")], peft.tuners.lora.ArrowConfig(top_k=1)
    )
    arrow.save_pretrained(tmp_path / "all")
    with pytest.raises(ValueError, match=r"arrow_config: is .* an Arrow router"):
        peftkern.attach_adapters(plain, {"router": tmp_path / "all" / "arrow_router"})
    assert peftkern.attach_adapters(plain, {"e1": tmp_path / "e1"}).names == ["e1"]


class _Code:
    def __reduce__(self):
        return print, ("a pickle ran",)


def _pickled(value, protocol=2):
    def write(folder):
        (folder / SAFETENSORS).unlink()
        (folder / PICKLE).write_bytes(pickle.dumps(value, protocol))

    return write


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (lambda f: (to_pickle(f), torch.save({"a": _Code()}, f / PICKLE)), "is a pickle of more than tensors"),
        (_pickled({"a": _Code()}), "is a pickle of more than tensors"),
        (lambda f: (to_pickle(f), torch.save({"a": 3}, f / PICKLE)), "a: is a int, expected a tensor"),
        (lambda f: (to_pickle(f), torch.save(torch.ones(3), f / PICKLE)), "a pickled Tensor, expected tensors by name"),
        (lambda f: (to_pickle(f), (f / PICKLE).write_bytes((f / PICKLE).read_bytes()[:-99])), "cannot be read"),
        (lambda f: (to_pickle(f), (f / PICKLE).write_bytes(b"")), "cannot be read"),
        (lambda f: (to_pickle(f), (f / PICKLE).write_bytes(b"no pickle at all")), "cannot be read"),
        (lambda f: to_pickle(f, lambda t: t.to(torch.int8)), "lora_A.weight: is stored as int8"),
    ],
)
def test_pickles_that_are_refused(saved, write, text, capsys):
    plain, folder, _ = saved()
    write(folder)
    with pytest.raises(ValueError) as caught:
        peftkern.attach_adapters(plain, {"one": folder})
    assert str(folder / PICKLE) in str(caught.value) and text in str(caught.value), caught.value
    assert "ran" not in capsys.readouterr().out


def _renamed(pattern):
    def change(t):
        return {pattern(key, "lora_A" in key): value for key, value in t.items()}

    return change


TOOLS = {
    "kohya": (lambda k, a: f"lora_unet_{k.split('.lora_')[0].replace('.', '_')}.lora_{'down' if a else 'up'}.weight"),
    "kohya's, of text encoders": (lambda k, a: f"lora_te1_{k[:40]}_{a}.lora_{'down' if a else 'up'}.weight"),
    "torchtune": (lambda k, a: k.replace("lora_A", "lora_a").replace("lora_B", "lora_b")),
    "MLX": (lambda k, a: k.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")),
    "loralib": (lambda k, a: k.removesuffix(".weight")),
    "the adapters library": (lambda k, a: k.replace(".lora_", ".loras.one.lora_").removesuffix(".weight")),
    "LyCORIS": (lambda k, a: k.replace("lora_A.weight", "hada_w1_a").replace("lora_B.weight", "hada_w1_b")),
    "XLabs": (lambda k, a: f"{k.split('.lora_')[0]}.processor.qkv_lora1.{'down' if a else 'up'}.weight"),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_keys_of_other_tools(saved, tool):
    plain, folder, _ = saved()
    tensors(folder, _renamed(TOOLS[tool]))
    first = min(load_file(folder / SAFETENSORS))
    name = tool.split("'")[0]
    with pytest.raises(ValueError, match=rf"{SAFETENSORS}: .*: is written as .*{name}.* does") as caught:
        peftkern.attach_adapters(plain, {"one": folder})
    assert first.split(".")[0] in str(caught.value)


def test_keys_that_contradict_each_other(saved):
    plain, folder, _ = saved()
    whole = load_file(folder / SAFETENSORS)
    tensors(folder, lambda t: {**t, **{key.replace(".weight", ".other.weight"): v.clone() for key, v in t.items()}})
    with pytest.raises(ValueError, match="belongs to another adapter"):
        peftkern.attach_adapters(plain, {"one": folder})
    tensors(folder, lambda _: whole)
    config(folder, target_modules=["q_proj", "down_proj"])
    with pytest.raises(
        ValueError, match=r"gate_proj.lora_A.weight: is of a layer that the config's target_modules do not"
    ):
        peftkern.attach_adapters(plain, {"one": folder})
