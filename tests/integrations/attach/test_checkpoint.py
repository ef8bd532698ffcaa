"""Checkpoints that do not fit are refused with file and key, and nothing changes; those that do scale as PEFT scales."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftkern
from peftkern.integrations.attach.checkpoint import CONFIG, Checkpoint
from peftkern.integrations.attach.weights import SAFETENSORS as WEIGHTS

Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


@pytest.fixture
def saved(zoo, tmp_path):
    """(plain model, {name: folder})."""
    twin = zoo.several("llama", good={"r": 4}, bad={"r": 6})
    twin.save_pretrained(tmp_path)
    return twin.unload().eval(), {name: tmp_path / name for name in ("good", "bad")}


def weights(change):
    """Rewrites the tensors of a folder."""

    def apply(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({key: t.clone() for key, t in tensors.items()}, folder / WEIGHTS)

    return apply


def config(**values):
    """Changes settings of a folder's config; ``...`` deletes one."""

    def apply(folder):
        settings = json.loads((folder / CONFIG).read_text())
        settings.update(values)
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in settings.items() if v != "delete"}))

    return apply


def both(*changes):
    """Several changes of a folder."""
    return lambda folder: [change(folder) for change in changes]


def data(file, change):
    """Rewrites the bytes of a file."""

    def apply(folder):
        (folder / file).write_bytes(change((folder / file).read_bytes()))

    return apply


def _corrupt_header(raw):
    return raw[:8] + b"#" + raw[9:]


def _unlink(file):
    return lambda folder: (folder / file).unlink()


def _directory(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def _renamed(tensors):
    for key in list(tensors):
        tensors[key.replace("q_proj", "query")] = tensors.pop(key)


# What is done to the folder -> file and text that the message names.
WRONG = {
    "no weights": (_unlink(WEIGHTS), WEIGHTS, "cannot be read"),
    "no config": (_unlink(CONFIG), CONFIG, "cannot be read"),
    "no folder": (shutil.rmtree, CONFIG, "cannot be read"),
    "a folder instead of weights": (_directory, WEIGHTS, "cannot be read"),
    "truncated": (data(WEIGHTS, lambda raw: raw[:-100]), WEIGHTS, "cannot be read as safetensors"),
    "truncated in the header": (data(WEIGHTS, lambda raw: raw[:60]), WEIGHTS, "cannot be read as safetensors"),
    "empty": (data(WEIGHTS, lambda raw: b""), WEIGHTS, "cannot be read as safetensors"),
    "longer than it says": (data(WEIGHTS, lambda raw: raw + b"\0" * 64), WEIGHTS, "cannot be read as safetensors"),
    "corrupt header": (data(WEIGHTS, _corrupt_header), WEIGHTS, "cannot be read as safetensors"),
    "config that is no JSON": (data(CONFIG, lambda raw: raw[:-20]), CONFIG, "no JSON"),
    "config in no encoding": (data(CONFIG, lambda raw: b"\xff\xfe\x00" + raw), CONFIG, "no JSON"),
    "config that is a list": (data(CONFIG, lambda raw: b"[]"), CONFIG, "holds a list"),
    "another method": (config(peft_type="LOKR"), CONFIG, "peft_type"),
    "no method": (config(peft_type="delete"), CONFIG, "peft_type"),
    "DoRA without magnitudes": (config(use_dora=True), WEIGHTS, "proj.lora_magnitude_vector: is missing"),
    "DoRA with a bias": (config(use_dora=True, lora_bias=True), CONFIG, "lora_bias: is True along with use_dora"),
    "DoRA with magnitudes of another size": (
        both(
            config(use_dora=True),
            weights(
                lambda t: t.update(
                    {k.replace("B.weight", "magnitude_vector"): torch.ones(31) for k in t if "B.weight" in k}
                )
            ),
        ),
        WEIGHTS,
        "lora_magnitude_vector: has shape (31,), expected (32,)",
    ),
    "DoRA's magnitudes": (
        weights(lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)})),
        WEIGHTS,
        f"{Q}.lora_magnitude_vector",
    ),
    "no lora_bias": (config(lora_bias=True), WEIGHTS, "proj.lora_B.bias: is missing"),
    "the bias of a branch": (weights(lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(32)})), WEIGHTS, "lora_B.bias"),
    "biases": (config(bias="lora_only"), CONFIG, "bias"),
    "whole modules": (
        config(modules_to_save=["lm_head"]),
        WEIGHTS,
        "lm_head.weight: is missing, though modules_to_save",
    ),
    "aLoRA": (config(alora_invocation_tokens=[1, 2]), CONFIG, "alora_invocation_tokens"),
    "QALoRA": (config(use_qalora=True), CONFIG, "use_qalora"),
    "parameters": (config(target_parameters=["x"]), CONFIG, "target_parameters"),
    "a setting of the future": (config(use_something=3), CONFIG, "use_something"),
    "PiSSA": (config(init_lora_weights="pissa_niter_4"), CONFIG, "init_lora_weights"),
    "OLoRA": (config(init_lora_weights="olora"), CONFIG, "init_lora_weights"),
    "rank 0": (config(r=0), CONFIG, ": r:"),
    "rank true": (config(r=True), CONFIG, ": r:"),
    "alpha that is a word": (config(lora_alpha="12"), CONFIG, "lora_alpha"),
    "alpha NaN": (config(lora_alpha=math.nan), CONFIG, "lora_alpha"),
    "rank_pattern that is a list": (config(rank_pattern=[3]), CONFIG, "rank_pattern"),
    "rank_pattern with a rank 0": (config(rank_pattern={"q_proj": 0}), CONFIG, "rank_pattern"),
    "alpha_pattern that is no pattern": (config(alpha_pattern={"(": 2}), CONFIG, "alpha_pattern"),
    "targets that are no names": (config(target_modules=[1]), CONFIG, "target_modules"),
    "targets that are no pattern": (config(target_modules="("), CONFIG, "target_modules"),
    "exclusions that are no pattern": (config(exclude_modules="("), CONFIG, "exclude_modules"),
    "a rank that the config denies": (config(r=5), WEIGHTS, "lora_A.weight: has shape (6, "),
    "a rank that a pattern denies": (config(rank_pattern={"q_proj": 5}), WEIGHTS, A),
    "a key of another kind": (weights(lambda t: t.update(x=torch.ones(3))), WEIGHTS, ": x:"),
    "a key without prefix": (weights(lambda t: t.update({A.removeprefix("base_model."): t.pop(A)})), WEIGHTS, A[11:]),
    "an embedding": (weights(lambda t: t.update({f"{Q}.lora_embedding_A": torch.ones(3)})), WEIGHTS, "embedding_A"),
    "a weight of nothing": (weights(lambda t: t.update({f"{Q}.gate.weight": torch.ones(3)})), WEIGHTS, "gate.weight"),
    "a weight of the model, changed": (
        weights(lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(64, 32)})),
        WEIGHTS,
        "embed_tokens.weight: differs from the model's",
    ),
    "a weight of the model, resized": (
        weights(lambda t: t.update({f"{Q}.base_layer.weight": torch.ones(32, 31)})),
        WEIGHTS,
        f"{Q}.base_layer.weight: differs from the model's",
    ),
    "no lora_B": (weights(lambda t: t.pop(B)), WEIGHTS, f"{B}: is missing"),
    "no lora_A": (weights(lambda t: t.pop(A)), WEIGHTS, f"{A}: is missing"),
    "no key at all": (weights(lambda t: t.clear()), WEIGHTS, "holds no adapter"),
    "another K": (weights(lambda t: t.update({A: torch.ones(6, 31)})), WEIGHTS, f"{A}: has shape (6, 31)"),
    "another N": (weights(lambda t: t.update({B: torch.ones(33, 6)})), WEIGHTS, f"{B}: has shape (33, 6)"),
    "ranks that differ": (weights(lambda t: t.update({B: torch.ones(32, 5)})), WEIGHTS, f"{B}: has shape (32, 5)"),
    "one dimension": (weights(lambda t: t.update({A: torch.ones(192)})), WEIGHTS, f"{A}: has shape (192,)"),
    "integers": (weights(lambda t: t.update({A: t[A].to(torch.int8)})), WEIGHTS, f"{A}: is stored as I8"),
    "modules that the model lacks": (weights(_renamed), WEIGHTS, "no module 'model.layers.0.self_attn.query'"),
    "a module of another kind": (
        weights(lambda t: t.update({k.replace("self_attn.q_proj", "input_layernorm"): v for k, v in t.items()})),
        WEIGHTS,
        "LlamaRMSNorm, expected torch.nn.Linear",
    ),
}


def state(model, multi=None):
    own = {name: {k: v for k, v in vars(m).items() if k != "training"} for name, m in model.named_modules()}
    own = {name: {k: id(v) for k, v in values.items()} for name, values in own.items()}
    if multi is None:
        return own
    banks = {name: (bank.names, id(bank)) for name, bank in multi.banks.items()}
    return own, banks, multi.names, multi.layers


@pytest.mark.parametrize("case", WRONG)
def test_refused_and_nothing_changes(zoo, saved, case):
    change, file, text = WRONG[case]
    model, folders = saved
    multi = peftkern.attach_adapters(model, {"good": folders["good"]})
    inputs = zoo.batch("llama", rows=2)["input_ids"]
    with multi.use(["good", None]):
        expected = model(inputs).logits
    before = state(model, multi)
    change(folders["bad"])
    with pytest.raises(ValueError) as caught:
        multi.add("bad", folders["bad"])
    assert str(folders["bad"] / file) in str(caught.value) and text in str(caught.value), caught.value
    assert state(model, multi) == before
    with multi.use(["good", None]):
        assert torch.equal(model(inputs).logits, expected)
    # The same at the first attachment: not even the good one stays.
    multi.detach()
    before = state(model)
    with pytest.raises(ValueError, match="bad"):
        peftkern.attach_adapters(model, folders)
    assert state(model) == before


def test_an_error_while_weights_are_read_changes_nothing(saved, monkeypatch):
    model, folders = saved
    multi = peftkern.attach_adapters(model, {"good": folders["good"]})
    stock = Checkpoint.tensors

    def breaks(self):
        for i, part in enumerate(stock(self)):
            if i == 5:
                raise MemoryError
            yield part

    before = state(model, multi)
    monkeypatch.setattr(Checkpoint, "tensors", breaks)
    with pytest.raises(MemoryError):
        multi.add("bad", folders["bad"])
    assert state(model, multi) == before
    multi.detach()
    before = state(model)
    with pytest.raises(MemoryError):
        peftkern.attach_adapters(model, folders)
    assert state(model) == before
    monkeypatch.undo()
    assert peftkern.attach_adapters(model, folders).names == ["good", "bad"]


def test_names_room_and_arguments(saved):
    model, folders = saved
    multi = peftkern.attach_adapters(model, folders, max_adapters=2, max_rank=6)
    with pytest.raises(ValueError, match="'good' is attached already"):
        multi.add("good", folders["good"])
    with pytest.raises(RuntimeError, match="no room for 1 more adapters: 2 of 2"):
        multi.add("more", folders["good"])
    multi.remove("good")
    weights(lambda t: t.update({k: v.repeat(2, 1) if "_A" in k else v.repeat(1, 2) for k, v in t.items()}))(
        folders["bad"]
    )
    config(r=12)(folders["bad"])
    with pytest.raises(ValueError, match=r"lora_A.weight: has rank 12, but .* ranks up to 6"):
        multi.add("wide", folders["bad"])
    with pytest.raises(TypeError, match="name of an adapter must be a string, got int"):
        multi.add(3, folders["good"])
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        peftkern.attach_adapters("model", folders)
    with pytest.raises(TypeError, match="adapters must map names to folders, got list"):
        peftkern.attach_adapters(model, list(folders.values()))


def test_a_layer_that_is_not_plain(zoo, saved):
    model, folders = saved
    layer = model.model.layers[1].mlp.gate_proj
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate_proj.*has a forward that was replaced"):
        peftkern.attach_adapters(model, folders)
    del layer.forward
    twin = zoo.several("llama", other={})
    with pytest.raises(ValueError, match=r"has no module 'model.layers.0"):
        peftkern.attach_adapters(twin, folders)
    with pytest.raises(ValueError, match=r"peft.tuners.lora.layer.Linear, expected torch.nn.Linear"):
        peftkern.attach_adapters(twin.base_model.model, folders)
    with pytest.raises(ValueError, match="no weight yet"):
        peftkern.attach_adapters(zoo.copy(model).to("meta"), folders)


PATTERNS = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rsLoRA": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "alpha of a fraction": {"lora_alpha": 0.5},
    "ranks by end of name": {"rank_pattern": {"q_proj": 7, "mlp.down_proj": 2}},
    "by number": {"rank_pattern": {"layers.1.self_attn.q_proj": 7}, "alpha_pattern": {"layers.0.mlp.down_proj": 3}},
    "by expression": {
        "alpha_pattern": {r".*\.0\..*": 1, "k_proj|v_proj": 30},
        "rank_pattern": {r"layers\.\d\.mlp.*": 1},
    },
    "the first that fits": {"alpha_pattern": {"q_proj": 2, "self_attn.q_proj": 9}},
    "not inside a name": {"alpha_pattern": {"proj": 2, "q": 3}},
    "both, rsLoRA": {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 2}},
    "a pattern of targets": {"target_modules": r".*self_attn\.(q|v)_proj"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "all linear": {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("case", PATTERNS)
def test_ranks_and_scalings_are_pefts(zoo, tmp_path, case):
    twin = zoo.several("llama", one=PATTERNS[case])
    twin.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path / "one")
    layers = {n.removeprefix("base_model.model."): m for n, m in zoo.lora_layers(twin).items()}
    assert checkpoint.parts.keys() == layers.keys()
    for name, tensors in checkpoint.tensors():
        part, layer = checkpoint.parts[name], layers[name]
        (A, B, bias), (scaling,) = part.method.stored.take(part.settings, part.module, tensors)
        assert part.rank == layer.r["one"] and scaling == pytest.approx(layer.scaling["one"], rel=1e-12)
        assert torch.equal(A, layer.lora_A["one"].weight) and torch.equal(B, layer.lora_B["one"].weight)
        assert bias is None
    inputs = zoo.batch("llama", rows=2)["input_ids"]
    expected = twin(inputs).logits
    plain = twin.unload()
    with peftkern.attach_adapters(plain, {"one": tmp_path / "one"}).use(["one", "one"]):
        torch.testing.assert_close(plain(inputs).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("save", [True, "auto", False])
def test_heads_that_peft_saves_along(zoo, tmp_path, save):
    twin = zoo.several("llama", one={"target_modules": ["lm_head", "q_proj"]})
    twin.save_pretrained(tmp_path, save_embedding_layers=save)
    checkpoint = Checkpoint(tmp_path / "one")
    assert bool(checkpoint.copies) == (save is not False)
    inputs = zoo.batch("llama", rows=2)["input_ids"]
    expected = twin(inputs).logits
    plain = twin.unload()
    with peftkern.attach_adapters(plain, {"one": tmp_path / "one"}).use(["one", "one"]):
        torch.testing.assert_close(plain(inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_one_module_under_two_names(zoo, saved):
    model, folders = saved
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    second.q_proj = first.q_proj
    with pytest.raises(ValueError, match="shares its module with another key"):
        peftkern.attach_adapters(model, folders)
