"""Attached adapters of experts' parameters: row by row what PEFT's own model of each adapter gives."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftkern
from peftkern.integrations.attach.config import CONFIG
from peftkern.integrations.attach.weights import SAFETENSORS
from peftkern.integrations.experts import contract

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
MODELS = {
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 24},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "head_dim": 8},
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
# Name -> what its config says.
ADAPTERS = {
    "both": {"target_parameters": BOTH, "target_modules": ["q_proj", "v_proj"]},
    "one": {"target_parameters": ["mlp.experts.down_proj"], "r": 3, "use_rslora": True},
    "patterns": {
        "target_parameters": BOTH[::-1], "rank_pattern": {"gate_up_proj": 5}, "alpha_pattern": {r"0\.mlp\.experts\.down_proj": 9},
    },
    "attention": {"target_modules": ["q_proj", "o_proj"]},
}  # fmt: skip
NAMES = ["both", None, "one", "patterns", "attention", "both"]


def _plain(kind="Mixtral", implementation="grouped_mm", dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **MODELS[kind])
    config._experts_implementation = implementation
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    model.set_experts_implementation(implementation)
    return model


def _saved(model, folder, **options):
    """A folder with this adapter, filled with random numbers, and PEFT's model of it."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options})
    stock = peft.get_peft_model(copy.deepcopy(model), config)
    stock.save_pretrained(folder)
    return stock.eval()


@pytest.fixture
def served(tmp_path):
    """kind -> (a plain model, {name: folder}, {name or None: stock model})."""

    def make(*args, **kwargs):
        plain = _plain(*args, **kwargs)
        stock = {name: _saved(plain, tmp_path / name, **options) for name, options in ADAPTERS.items()}
        return plain, {name: tmp_path / name for name in stock}, {**stock, None: copy.deepcopy(plain)}

    return make


def _rows(stock, names, ids, **options):
    """What each row alone gives in PEFT's own model of its adapter."""
    return torch.cat([stock[name](input_ids=ids[i : i + 1], **options).logits for i, name in enumerate(names)])


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """PEFT says that patterns of parameters match nothing, and applies them."""
    yield


EXACT = {"eager": (torch.float64, {}), "grouped_mm": (torch.float32, {"rtol": 1e-4, "atol": 1e-4})}


@pytest.mark.parametrize("implementation", EXACT)
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_each_row_is_peft_s(served, kind, implementation):
    dtype, tolerance = EXACT[implementation]
    plain, folders, stock = served(kind, implementation, dtype)
    multi = peftkern.attach_adapters(plain, folders)
    ids = torch.randint(40, (len(NAMES), 7))
    wanted = _rows(stock, NAMES, ids)
    base = stock[None](input_ids=ids).logits
    assert all(((wanted[i] - base[i]).abs().max() > 0.01) == (name is not None) for i, name in enumerate(NAMES))
    for _ in range(2):  # followed, then remembered
        with multi.use(NAMES):
            torch.testing.assert_close(plain(input_ids=ids).logits, wanted, **tolerance)
    assert len(multi.layouts) == 1
    for name in ("both", "one"):
        with multi.use(name):
            got = plain(input_ids=ids).logits
        torch.testing.assert_close(got, _rows(stock, [name] * len(ids), ids), **tolerance)
    assert torch.equal(plain(input_ids=ids).logits, base)


@torch.no_grad()
def test_generated(served):
    plain, folders, stock = served()
    multi = peftkern.attach_adapters(plain, folders)
    ids, names = torch.randint(3, 40, (4, 5)), ["one", "both", None, "patterns"]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0, "eos_token_id": None}
    with multi.use(names):
        got = plain.generate(input_ids=ids, **options)
    wanted = [stock[name].generate(input_ids=ids[i : i + 1], **options) for i, name in enumerate(names)]
    assert torch.equal(got, torch.cat(wanted)) and len({tuple(row[5:].tolist()) for row in got}) > 1


@torch.no_grad()
def test_added_and_removed(served):
    plain, folders, stock = served()
    multi = peftkern.attach_adapters(plain, {"both": folders["both"]})
    experts = plain.model.layers[0].mlp.experts.forward
    alone = experts.nbytes
    multi.add("one", folders["one"])
    assert experts.nbytes > alone and "model.layers.1.mlp.experts" in multi.layers
    assert all("experts" not in name for name in multi.banks) and len(multi.banks) == 4
    ids, names = torch.randint(40, (2, 5)), ["one", "both"]
    wanted = _rows(stock, names, ids)
    with multi.use(names):
        multi.remove("one")
        multi.add("one", folders["patterns"])
        torch.testing.assert_close(plain(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    with multi.use(names):
        other = plain(input_ids=ids).logits
    torch.testing.assert_close(other, _rows(stock, ["patterns", "both"], ids), rtol=1e-4, atol=1e-4)
    multi.remove("one")
    assert experts.nbytes == alone
    multi.detach()
    assert experts.nbytes == 0 and "forward" not in plain.model.layers[0].mlp.experts.__dict__
    assert torch.equal(plain(input_ids=ids).logits, stock[None](input_ids=ids).logits)


def test_gradients(served):
    """Of what goes in as in PEFT's model, and of weights that train as in the model with the adapter merged."""
    plain, folders, stock = served("Mixtral", "eager", torch.float64)
    merged = copy.deepcopy(stock["both"]).merge_and_unload().requires_grad_()
    x, dy = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 5, 40, dtype=torch.float64)
    found = []
    for trains in (False, True):
        plain.requires_grad_(trains)
        multi = peftkern.attach_adapters(plain, {"both": folders["both"]})
        given = x.clone().requires_grad_()
        with multi.use(["both", "both"]):
            plain(inputs_embeds=given).logits.backward(dy)
        found.append(given.grad)
        multi.detach()
    given = x.clone().requires_grad_()
    merged(inputs_embeds=given).logits.backward(dy)
    torch.testing.assert_close(found, [given.grad] * 2)
    for one, other in zip(
        (plain.model.layers[1].mlp.experts, plain.model.layers[0].mlp.gate), merged.model.layers[::-1]
    ):
        part = other.mlp.experts if hasattr(one, "down_proj") else other.mlp.gate
        for (name, p), (_, q) in zip(one.named_parameters(), part.named_parameters()):
            torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("autocast", [False, True], ids=["half base", "autocast"])
@pytest.mark.parametrize("name", ["both", "one", "patterns"])
@torch.no_grad()
def test_half_precision(served, name, autocast):
    """The error of a module against fp64 is at most 1.5 times PEFT's. (In a whole model a token may go to another expert.)"""
    plain, folders, stock = served("Mixtral", "grouped_mm", torch.float32 if autocast else torch.bfloat16)
    theirs = stock[name].base_model.model.model.layers[0].mlp.experts
    exact = copy.deepcopy(theirs).double()
    exact.get_base_layer().config._experts_implementation = "eager"  # grouped_mm takes no fp64
    multi = peftkern.attach_adapters(plain, folders)
    weights, index = torch.randn(200, 4).softmax(-1).topk(2)
    x, weights = (t.to(plain.dtype) for t in (torch.randn(200, 16), weights))
    right = exact(x.double(), index, weights.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), multi.use(name):
        got, wanted = plain.model.layers[0].mlp.experts(x, index, weights), theirs(x, index, weights)
    errors = [(t.double() - right).norm() for t in (got, wanted)]
    assert got.dtype == wanted.dtype and 0 < errors[0] <= 1.5 * errors[1], errors


@torch.no_grad()
def test_compiled(served):
    plain, folders, stock = served()
    multi = peftkern.attach_adapters(plain, folders)
    ids, names = torch.randint(40, (3, 6)), ["both", None, "one"]
    torch._dynamo.reset()
    compiled = torch.compile(plain, backend="aot_eager")
    for each in (names, names[::-1]):
        with multi.use(each):
            got = compiled(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(got, _rows(stock, each, ids), rtol=1e-4, atol=1e-4)


def _config(folder, **settings):
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def _tensors(folder, change):
    file = folder / SAFETENSORS
    save_file({key: t for key, t in change(load_file(file)).items() if t is not None}, file)


def _bias(folder):
    plain = _plain("GptOss")
    _saved(plain, folder, target_parameters=["experts.down_proj_bias"])
    return plain


KEY = "base_model.model.model.layers.0.mlp.experts"
# What is done to a folder (which may be for another model) -> the complaint.
REFUSED = {
    "bias": (
        _bias,
        r"target_parameters: mean down_proj_bias of model.layers.0.mlp.experts, which are not served together",
    ),
    "router": (
        lambda folder: _saved(_plain(), folder, target_parameters=["mlp.gate.weight"]) and None,
        r"gate.lora_A.weight: model.layers.0.mlp.gate is a transformers.*Router, expected torch.nn.Linear",
    ),
    "linear": (
        lambda folder: _saved(_plain(), folder, target_parameters=["q_proj.weight"]) and None,
        r"target_parameters: .*q_proj has an adapter of its parameter 'weight'",
    ),
    "bare": (lambda folder: _config(folder, target_parameters=["down_proj"]), "names 'down_proj' without its module"),
    "no list": (
        lambda folder: _config(folder, target_parameters="x.y"),
        "target_parameters: is 'x.y', expected a list",
    ),
    "DoRA": (
        lambda folder: _config(folder, use_dora=True),
        r"target_parameters: is \[.*which means adapters of parameters",
    ),
    "lora_bias": (
        lambda folder: _config(folder, lora_bias=True),
        "lora_bias: is True along with target_parameters",
    ),
    "not named": (
        lambda folder: _config(folder, target_parameters=["other.down_proj", "other.up_proj"]),
        "base_layer.lora_[AB].weight: is no part of the adapter that the config describes",
    ),
    "rank": (
        lambda folder: _config(folder, rank_pattern={"down_proj": 3}),
        r"experts.lora_A.weight: has shape \(16, 24\), expected \(12, 24\)",
    ),
    "one is missing": (
        lambda folder: _tensors(folder, lambda t: {**t, f"{KEY}.base_layer.lora_A.weight": None}),
        "experts.base_layer.lora_A.weight: is missing",
    ),
    "shape": (
        lambda folder: _tensors(folder, lambda t: {**t, f"{KEY}.lora_B.weight": torch.ones(15, 16)}),
        r"experts.lora_B.weight: has shape \(15, 16\), expected \(16, 16\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_checkpoints_that_are_refused(tmp_path, case):
    alter, complaint = REFUSED[case]
    plain, folder = _plain(), tmp_path / "a"
    _saved(plain, folder, **ADAPTERS["both"])
    plain = alter(folder) or plain
    with pytest.raises(ValueError, match=complaint):
        peftkern.attach_adapters(plain, {"a": folder})
    assert all("forward" not in m.__dict__ for m in plain.modules())


def _spread(experts):
    experts._is_expert_parallel = True


def _other(experts):
    experts.config._experts_implementation = "sonicmoe"


def _replaced(experts):
    experts.forward = lambda *args: args[0]


def _stored_wide(experts):
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to("meta"))


MODULES = {
    "spread": (_spread, "is not covered: its experts are spread over devices"),
    "implementation": (_other, "is not covered: its experts implementation is 'sonicmoe'"),
    "replaced": (_replaced, "has a forward that was replaced"),
    "elsewhere": (_stored_wide, "has a down_proj that is no plain tensor of three dimensions on a CPU"),
}


@pytest.mark.parametrize("case", MODULES)
def test_modules_that_are_refused(tmp_path, case):
    alter, complaint = MODULES[case]
    plain = _plain()
    _saved(plain, tmp_path, **ADAPTERS["both"])
    alter(plain.model.layers[0].mlp.experts)
    with pytest.raises(ValueError, match=f"model.layers.0.mlp.experts {complaint}"):
        peftkern.attach_adapters(plain, {"a": tmp_path})


def test_other_releases_are_refused(tmp_path, monkeypatch):
    plain = _plain()
    _saved(plain, tmp_path, **ADAPTERS["both"])
    monkeypatch.setattr(contract, "TRANSFORMERS", ("99.1.0", (5, 23)))
    with pytest.raises(ValueError, match=r"covered with transformers 5\.23, this is 99\.1\.0"):
        peftkern.attach_adapters(plain, {"a": tmp_path})


@torch.no_grad()
def test_layers_that_the_file_leaves_out(tmp_path):
    plain = _plain()
    stock = _saved(plain, tmp_path, **ADAPTERS["both"])
    _tensors(tmp_path, lambda t: {key: None if key.startswith(KEY) else value for key, value in t.items()})
    with pytest.warns(UserWarning, match=r"holds nothing for 1 layers .*\(model\.layers\.0\.mlp\.experts\)"):
        multi = peftkern.attach_adapters(plain, {"a": tmp_path})
    for name, p in stock.named_parameters():
        if "layers.0.mlp.experts" in name and "lora_" in name:
            p.zero_()
    ids = torch.randint(40, (2, 5))
    with multi.use("a"):
        torch.testing.assert_close(plain(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_attached_twice(tmp_path):
    plain = _plain()
    _saved(plain, tmp_path, **ADAPTERS["both"])
    peftkern.attach_adapters(plain, {"a": tmp_path})
    with pytest.raises(ValueError, match="has adapters attached already"):
        peftkern.attach_adapters(plain, {"a": tmp_path})
