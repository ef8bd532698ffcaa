"""Checkpoints of every method in one batch: each row equals its adapter alone in stock PEFT."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftkern
from peftkern.integrations.attach.checkpoint import CONFIG, Checkpoint
from peftkern.integrations.attach.fit import fit
from peftkern.integrations.attach.weights import SAFETENSORS
from peftkern.methods.registry import METHODS

peft = pytest.importorskip("peft")
FORWARD = {"llama": ["down_proj"], "gpt2": r".*\.mlp\.c_proj"}


def lora(**options):
    return lambda targets, forward: peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": targets, "lora_dropout": 0.1, **options}
    )


def vera(**options):
    return lambda targets, forward: peft.VeraConfig(**{"r": 12, "d_initial": 1.0, "target_modules": targets, **options})


def ia3(targets, forward):
    return peft.IA3Config(target_modules=targets, feedforward_modules=forward)


def adalora(targets, forward):
    return peft.AdaLoraConfig(init_r=6, target_r=2, total_step=3, lora_alpha=5, target_modules=targets)


def delora(**options):
    return lambda targets, forward: peft.DeloraConfig(r=5, delora_lambda=3, target_modules=targets, **options)


# Name -> its config, from the layers of the model and those that are feed-forward.
ADAPTERS = {
    "LoRA": lora(),
    "rsLoRA, patterns": lora(use_rslora=True, rank_pattern={"q_proj": 7, "c_fc": 5}, alpha_pattern={"down_proj": 3}),
    "lora_bias": lora(lora_bias=True),
    "DoRA": lora(use_dora=True),
    "DoRA, some layers": lambda targets, forward: lora(use_dora=True, use_rslora=True, r=9)(targets[1:3], forward),
    "VeRA": vera(),
    "VeRA again": vera(),
    "VeRA from its key": vera(save_projection=False, projection_prng_key=5, r=7),
    "VeRA, some layers": lambda targets, forward: vera()(targets[2:4], forward),
    "IA3": ia3,
    "AdaLoRA": adalora,
    "AdaLoRA, pruned": adalora,
    "BEFT": lambda targets, forward: peft.BeftConfig(target_modules=targets),
    "DeLoRA": delora(),
    "DeLoRA, patterns": delora(rank_pattern={"k_proj": 3}, lambda_pattern={"k_proj": 7}),
}
NO_CONV1D = ("BEFT", "DeLoRA", "DeLoRA, patterns")  # PEFT's know nn.Linear alone


def prune(model):
    """As training ends: half of the ranks of most layers are kept, of one all, of one none, and one has no entry."""
    pattern = {}
    for i, name in enumerate(n for n, _ in model.base_model.model.named_parameters() if ".lora_E." in n):
        pattern[name] = [(r + i) % 2 == 0 for r in range(6)] if i > 1 else [i == 0] * 6
    pattern.popitem()
    model.peft_config["default"].rank_pattern = pattern


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(kind, dtype) -> (plain model, {name: folder}), made once."""
    return {}, tmp_path_factory.mktemp("methods")


@pytest.fixture
def saved(zoo, made):
    """kind -> (a copy of the plain model, {name: folder})."""
    models, root = made

    def make(kind, dtype=torch.float32):
        if (kind, dtype) not in models:
            torch.manual_seed(0)
            plain, targets = zoo.models[kind]()
            plain = plain.to(dtype).eval()
            folders = {}
            for i, (name, config) in enumerate(ADAPTERS.items()):
                if kind == "gpt2" and name in NO_CONV1D:
                    continue
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model = peft.get_peft_model(zoo.copy(plain), config(targets, FORWARD[kind]))
                g = torch.Generator().manual_seed(i)
                with torch.no_grad():
                    for p in model.parameters():
                        if p.requires_grad and p.dim():
                            p.add_(torch.randn(p.shape, generator=g) * 0.2)
                if "pruned" in name:
                    prune(model)
                folders[name] = root / f"{kind} {dtype}" / name
                model.save_pretrained(folders[name])
            models[kind, dtype] = plain, folders
        plain, folders = models[kind, dtype]
        return zoo.copy(plain), folders

    return make


def alone(zoo, plain, folder):
    """The model with this adapter alone, as stock PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(zoo.copy(plain), folder).eval()


def edit(folder, into, change):
    """The folder with other tensors."""
    if into != folder:
        shutil.copytree(folder, into)
    new = load_file(folder / SAFETENSORS)
    change(new)
    save_file(new, into / SAFETENSORS)


def inputs_of(zoo, kind, rows):
    return {k: v for k, v in zoo.batch(kind, rows=rows).items() if k != "labels"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_a_batch_of_all_methods(zoo, saved, kind, dtype):
    plain, folders = saved(kind, dtype)
    names = [*folders, None]
    inputs = inputs_of(zoo, kind, len(names))
    base = plain(**inputs).logits
    multi = peftkern.attach_adapters(plain, folders)
    with multi.use(names):
        ours = plain(**inputs).logits
    multi.detach()
    assert torch.equal(ours[-1], base[-1])
    for i, (name, folder) in enumerate(folders.items()):
        model, row = alone(zoo, plain, folder), {k: v[i : i + 1] for k, v in inputs.items()}
        stock = model(**row).logits[0]
        exact = model.double()(**row).logits[0]
        assert (stock - base[i]).abs().max() > 0.02, name
        zoo.as_accurate(ours[i], stock, exact)


@torch.no_grad()
def test_generate(zoo, saved):
    plain, folders = saved("llama")
    names = ["DoRA", None, "IA3", "VeRA", "AdaLoRA, pruned", "lora_bias"]
    inputs = inputs_of(zoo, "llama", len(names))
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    with peftkern.attach_adapters(plain, folders).use(names):
        together = plain.generate(**inputs, **options)
    new = []
    for i, name in enumerate(names):
        model = saved("llama")[0] if name is None else alone(zoo, saved("llama")[0], folders[name])
        new.append(model.generate(**{k: v[i : i + 1] for k, v in inputs.items()}, **options)[0])
    assert torch.equal(together, torch.stack(new))
    assert len({tuple(row[-6:].tolist()) for row in new}) == len(names)


@torch.no_grad()
def test_swaps_evictions_and_what_they_cost(zoo, saved):
    """Adapters of all methods take turns in three places: each is right, whoever was there before, and nothing grows."""
    plain, folders = saved("llama")
    inputs = inputs_of(zoo, "llama", 3)
    expected = {n: alone(zoo, plain, f)(**inputs).logits for n, f in folders.items()}
    multi, size = peftkern.attach_adapters(plain, {}, max_adapters=3), 0
    for turn in range(2):
        for name, folder in folders.items():
            if len(multi) == 3:
                multi.remove(multi.names[0])
            with multi.use(multi.names[:1] or None):
                before = plain(**inputs).logits
                multi.add(name, folder)  # while another is in use
                assert torch.equal(plain(**inputs).logits, before)
            names = [*multi.names, None, None][:3]
            with multi.use(names):
                ours = plain(**inputs).logits
            for i, name in enumerate(names[: len(multi)]):
                torch.testing.assert_close(ours[i], expected[name][i], rtol=1e-4, atol=1e-5)
        bytes_now = sum(bank.nbytes for bank in multi.banks.values())
        assert turn == 0 or bytes_now == size
        size = bytes_now
    # One name, another method, while a call still has the first.
    multi.remove(multi.names[0])
    with multi.use([name]):
        multi.remove(name)
        multi.add(name, folders["IA3"])
        torch.testing.assert_close(plain(**inputs).logits[:1], expected[name][:1], rtol=1e-4, atol=1e-5)
    with multi.use([name]):
        torch.testing.assert_close(plain(**inputs).logits[:1], expected["IA3"][:1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_vera_adapters_share_their_matrices(zoo, saved, tmp_path):
    plain, folders = saved("llama")
    files = {f"copy {i}": tmp_path / str(i) for i in range(6)}
    for i, folder in enumerate(files.values()):
        edit(folders["VeRA"], folder, lambda t, i=i: t.update({k: v + i for k, v in t.items() if "lambda" in k}))
    multi = peftkern.attach_adapters(plain, {"VeRA": folders["VeRA"]})
    banks = multi.banks.values()
    used = sum(bank.nbytes for bank in banks)
    for name, folder in files.items():
        multi.add(name, folder)
    multi.add("again", folders["VeRA again"])
    assert all(len(bank.pairs) == 1 and len(bank) == 8 for bank in banks)
    assert sum(bank.nbytes for bank in banks) == used
    changed = tmp_path / "changed"
    edit(folders["VeRA"], changed, lambda t: t["base_model.vera_A"].mul_(2.0))
    multi.add("changed", changed)
    assert all(len(bank.pairs) == 2 for bank in banks)
    inputs = inputs_of(zoo, "llama", 3)
    with multi.use(["changed", "again", "copy 5"]):
        ours = plain(**inputs).logits
    multi.detach()
    for i, folder in enumerate((changed, folders["VeRA again"], files["copy 5"])):
        torch.testing.assert_close(ours[i], alone(zoo, plain, folder)(**inputs).logits[i], rtol=1e-4, atol=1e-5)
    assert not any(bank.pairs for bank in banks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_matrices_that_a_checkpoint_leaves_to_their_key(zoo, saved, kind, dtype):
    plain, folders = saved(kind, dtype)
    stock = alone(zoo, plain, folders["VeRA from its key"]).base_model
    fitted = fit(Checkpoint(folders["VeRA from its key"]), dict(plain.named_modules()), ())
    made = fitted.checkpoint.shared_tensors(fitted.sizes)
    for name in ("vera_A", "vera_B"):
        expected = getattr(stock, name)["default"]
        assert made[name].dtype == dtype and torch.equal(made[name].to(expected), expected)


@pytest.mark.parametrize("name", ["DoRA", "lora_bias", "VeRA", "IA3", "AdaLoRA, pruned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_files_in_half_precision(zoo, saved, tmp_path, name, dtype):
    plain, folders = saved("llama", dtype)
    edit(folders[name], tmp_path / "one", lambda t: t.update({k: v.half() for k, v in t.items()}))
    inputs = inputs_of(zoo, "llama", 2)
    with peftkern.attach_adapters(plain, {"one": tmp_path / "one"}).use(["one", None]):
        ours = plain(**inputs).logits[0]
    model = alone(zoo, saved("llama", dtype)[0], tmp_path / "one")
    stock = model(**inputs).logits[0]
    zoo.as_accurate(ours, stock, model.double()(**inputs).logits[0])


@torch.no_grad()
def test_a_weight_that_changes_since(zoo, saved):
    """What was computed from it stays until the adapter is added again."""
    plain, folders = saved("llama")
    inputs = inputs_of(zoo, "llama", 2)
    multi = peftkern.attach_adapters(plain, {n: folders[n] for n in ("DoRA", "LoRA")})
    plain.model.layers[0].self_attn.v_proj.weight.mul_(3.0)
    stock = [alone(zoo, plain, folders[n])(**inputs).logits for n in ("DoRA", "LoRA")]
    with multi.use(["DoRA", "LoRA"]):
        ours = plain(**inputs).logits
    assert (ours[0] - stock[0][0]).abs().max() > 1e-3
    torch.testing.assert_close(ours[1], stock[1][1], rtol=1e-4, atol=1e-5)
    multi.remove("DoRA")
    multi.add("DoRA", folders["DoRA"])
    with multi.use(["DoRA", "LoRA"]):
        torch.testing.assert_close(plain(**inputs).logits[0], stock[0][0], rtol=1e-4, atol=1e-5)


def test_a_model_that_is_not_frozen(zoo, saved):
    """The base's gradient is refused where an adapter acts on the base, and x's is right once it is frozen."""
    plain, folders = saved("llama")
    inputs = inputs_of(zoo, "llama", 3)
    multi = peftkern.attach_adapters(plain, {n: folders[n] for n in ("DoRA", "IA3", "LoRA")})
    names = ["DoRA", "IA3", "LoRA"]
    with torch.no_grad(), multi.use(names):
        expected = plain(**inputs).logits
    plain.requires_grad_(True)
    with multi.use(names):
        y = plain(**inputs).logits
        assert torch.equal(y, expected)
        with pytest.raises(RuntimeError, match=r"_proj: adapter .* acts on the base, whose weight .* freeze"):
            y.square().mean().backward()
    plain.requires_grad_(False)
    embeddings = torch.randn(3, 4, 32, requires_grad=True)
    with multi.use(names):
        plain(inputs_embeds=embeddings).logits.square().sum().backward()
    multi.detach()
    for i, name in enumerate(names):
        own = embeddings.detach()[i : i + 1].requires_grad_(True)
        alone(zoo, plain, folders[name])(inputs_embeds=own).logits.square().sum().backward()
        torch.testing.assert_close(embeddings.grad[i], own.grad[0], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_model_that_accelerate_keeps_elsewhere(zoo, saved):
    accelerate = pytest.importorskip("accelerate")
    plain, folders = saved("gpt2")
    names = ["DoRA", "IA3", "lora_bias"]
    inputs = inputs_of(zoo, "gpt2", 3)
    with peftkern.attach_adapters(plain, {n: folders[n] for n in names}).use(names):
        expected = plain(**inputs).logits
    plain, _ = saved("gpt2")
    accelerate.cpu_offload(plain, execution_device="cpu")
    with peftkern.attach_adapters(plain, {n: folders[n] for n in names}).use(names):
        torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


L = "base_model.model.model.layers.0.self_attn.k_proj"


def tensors(change):
    return lambda folder: edit(folder, folder, change)


def config(**values):
    def change(folder):
        settings = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**settings, **values}))

    return change


# Whose folder, what is done to it, the text of the message.
WRONG = {
    "a magnitude less": ("DoRA", tensors(lambda t: t.pop(f"{L}.lora_magnitude_vector")), "is missing"),
    "magnitudes of another size": (
        "DoRA",
        tensors(lambda t: t.update({f"{L}.lora_magnitude_vector": torch.ones(9)})),
        f"{L}.lora_magnitude_vector: has shape (9,), expected (16,)",
    ),
    "DoRA that the config denies": ("DoRA", config(use_dora=False), "lora_magnitude_vector: is no part of the adapter"),
    "a bias less": ("lora_bias", tensors(lambda t: t.pop(f"{L}.lora_B.bias")), f"{L}.lora_B.bias: is missing"),
    "a bias that the config denies": ("lora_bias", config(lora_bias=False), "lora_B.bias: is no part of the adapter"),
    "no projection": ("VeRA", tensors(lambda t: t.pop("base_model.vera_A")), "base_model.vera_A: is missing"),
    "a narrow projection": (
        "VeRA",
        tensors(lambda t: t.update({"base_model.vera_A": torch.ones(12, 31)})),
        "base_model.vera_A: has shape (12, 31), expected at least (12, 48)",
    ),
    "a projection of another rank": (
        "VeRA",
        tensors(lambda t: t.update({"base_model.vera_B": torch.ones(48, 11)})),
        "base_model.vera_B: has shape (48, 11), but the config gives it rank 12",
    ),
    "a rank that the config denies": ("VeRA", config(r=11), "vera_lambda_d: has shape (12,), but the config gives"),
    "lambda_b of another size": (
        "VeRA",
        tensors(lambda t: t.update({f"{L}.vera_lambda_b": torch.ones(32)})),
        f"{L}.vera_lambda_b: has shape (32,), expected (16,)",
    ),
    "no lambda_d": ("VeRA", tensors(lambda t: t.pop(f"{L}.vera_lambda_d")), f"{L}.vera_lambda_d: is missing"),
    "VeRA's biases": ("VeRA", config(bias="vera_only"), "bias: is 'vera_only'"),
    "a key that is none": ("VeRA from its key", config(projection_prng_key="x"), "projection_prng_key: is 'x'"),
    "layers less, and no projection": (
        "VeRA from its key",
        tensors(lambda t: [t.pop(k) for k in list(t) if k.startswith(L)]),
        f"{L}: is missing, and vera_A and vera_B, which the file lacks too",
    ),
    "no feedforward_modules": ("IA3", config(feedforward_modules=None), "feedforward_modules: is missing"),
    "another side": ("IA3", config(feedforward_modules=["k_proj"]), "ia3_l: has shape (1, 48), expected (N, 1)"),
    "a vector of another size": (
        "IA3",
        tensors(lambda t: t.update({f"{L}.ia3_l": torch.ones(17, 1)})),
        f"{L}.ia3_l: has shape (17, 1), expected (16, 1)",
    ),
    "a vector without sides": (
        "IA3",
        tensors(lambda t: t.update({f"{L}.ia3_l": torch.ones(16)})),
        f"{L}.ia3_l: has shape (16,), expected (N, 1)",
    ),
    "integers": (
        "IA3",
        tensors(lambda t: t.update({f"{L}.ia3_l": torch.ones(16, 1, dtype=torch.int8)})),
        f"{L}.ia3_l: is stored as I8",
    ),
    "no lora_E": ("AdaLoRA", tensors(lambda t: t.pop(f"{L}.lora_E")), f"{L}.lora_E: is missing"),
    "a rank that was pruned": ("AdaLoRA, pruned", config(rank_pattern=None), "has shape"),
    "a pattern of numbers": ("AdaLoRA, pruned", config(rank_pattern={"q.lora_E": [1, 0]}), "rank_pattern: has the"),
    "a pattern that is a list": ("AdaLoRA, pruned", config(rank_pattern=[3]), "rank_pattern: is [3]"),
    "no start": ("AdaLoRA", config(init_r=0), "init_r: is 0"),
    "AdaLoRA as LoRA": ("AdaLoRA", config(peft_type="LORA"), "target_r: is 2: this setting is unknown"),
    "AdaLoRA with DoRA": ("AdaLoRA", config(use_dora=True), "use_dora: is True, which means DoRA"),
    "KaSA": ("LoRA", config(kasa_config={}), "kasa_config: is {}, which means KaSA, which has changed the base"),
    "aLoRA": ("LoRA", config(alora_invocation_tokens=[1]), "means aLoRA, which acts on some tokens"),
    "DeLoRA without norms": (
        "DeLoRA",
        tensors(lambda t: t.pop(f"{L}.delora_w_norm")),
        f"{L}.delora_w_norm: is missing",
    ),
    "BEFT of another size": (
        "BEFT",
        tensors(lambda t: t.update({f"{L}.beft_bias": torch.ones(1, 15)})),
        f"{L}.beft_bias: has shape (1, 15), expected (1, 16)",
    ),
    "BOFT": ("LoRA", config(peft_type="BOFT"), "peft_type: is 'BOFT', expected 'ADALORA' or 'BEFT' or 'DELORA' or"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.filterwarnings("ignore:.*holds nothing for")
def test_refused_and_nothing_changes(saved, tmp_path, case):
    name, change, text = WRONG[case]
    plain, folders = saved("llama")
    shutil.copytree(folders[name], tmp_path / "one")
    change(tmp_path / "one")
    multi = peftkern.attach_adapters(plain, {"IA3": folders["IA3"]})
    with pytest.raises(ValueError) as caught:
        multi.add("one", tmp_path / "one")
    assert str(tmp_path / "one") in str(caught.value) and text in str(caught.value), caught.value
    assert multi.names == ["IA3"] and all(bank.names == ["IA3#0"] for bank in multi.banks.values())


@pytest.mark.parametrize(
    "change",
    [config(lora_alpha=-1), config(use_rslora=True, lora_bias=True), config(alpha_pattern={"q_proj": 3}, r=3)],
    ids=["no alpha", "rsLoRA", "patterns"],
)
@torch.no_grad()
def test_settings_of_loras_that_adalora_ignores(zoo, saved, tmp_path, change):
    plain, folders = saved("llama")
    shutil.copytree(folders["AdaLoRA, pruned"], tmp_path / "one")
    change(tmp_path / "one")
    inputs = inputs_of(zoo, "llama", 1)
    expected = alone(zoo, plain, tmp_path / "one")(**inputs).logits
    with peftkern.attach_adapters(plain, {"one": tmp_path / "one"}).use("one"):
        torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_every_form_is_tested_here(saved):
    _, folders = saved("llama")
    methods = {part.method.name for folder in folders.values() for part in Checkpoint(folder).parts.values()}
    assert methods == {method.name for method in METHODS.values() if method.stored is not None}
