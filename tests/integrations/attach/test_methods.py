"""Checkpoints of every method in one batch: each row equals its adapter alone in stock PEFT."""

import copy
import json
import shutil

import pytest
import torch
from torch import nn

import peftkern
from peftkern.integrations.attach.checkpoint import CONFIG, Checkpoint
from peftkern.integrations.attach.fit import fit
from peftkern.methods.registry import METHODS

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_a_batch_of_all_methods(zoo, methods, kind, dtype):
    plain, folders = methods.saved(kind, dtype)
    names = [*folders, None]
    inputs = methods.inputs(kind, len(names))
    base = plain(**inputs).logits
    multi = peftkern.attach_adapters(plain, folders)
    with multi.use(names):
        ours = plain(**inputs).logits
    multi.detach()
    assert torch.equal(ours[-1], base[-1])
    for i, (name, folder) in enumerate(folders.items()):
        model, row = methods.alone(plain, folder), {k: v[i : i + 1] for k, v in inputs.items()}
        stock = model(**row).logits[0]
        exact = model.double()(**row).logits[0]
        assert (stock - base[i]).abs().max() > 0.02, name
        zoo.as_accurate(ours[i], stock, exact)


@torch.no_grad()
def test_generate(zoo, methods):
    plain, folders = methods.saved("llama")
    names = ["DoRA", None, "IA3", "VeRA", "AdaLoRA, pruned", "lora_bias"]
    inputs = methods.inputs("llama", len(names))
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    with peftkern.attach_adapters(plain, folders).use(names):
        together = plain.generate(**inputs, **options)
    new = []
    for i, name in enumerate(names):
        model = methods.saved("llama")[0] if name is None else methods.alone(methods.saved("llama")[0], folders[name])
        new.append(model.generate(**{k: v[i : i + 1] for k, v in inputs.items()}, **options)[0])
    assert torch.equal(together, torch.stack(new))
    assert len({tuple(row[-6:].tolist()) for row in new}) == len(names)


@torch.no_grad()
def test_swaps_evictions_and_what_they_cost(zoo, methods):
    """Adapters of all methods take turns in three places: each is right, whoever was there before, and nothing grows."""
    plain, folders = methods.saved("llama")
    inputs = methods.inputs("llama", 3)
    expected = {n: methods.alone(plain, f)(**inputs).logits for n, f in folders.items()}
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
def test_vera_adapters_share_their_matrices(zoo, methods, tmp_path):
    plain, folders = methods.saved("llama")
    files = {f"copy {i}": tmp_path / str(i) for i in range(6)}
    for i, folder in enumerate(files.values()):
        methods.edit(
            folders["VeRA"], folder, lambda t, i=i: t.update({k: v + i for k, v in t.items() if "lambda" in k})
        )
    multi = peftkern.attach_adapters(plain, {"VeRA": folders["VeRA"]})
    banks = multi.banks.values()
    used = sum(bank.nbytes for bank in banks)
    for name, folder in files.items():
        multi.add(name, folder)
    multi.add("again", folders["VeRA again"])
    assert all(len(bank.pairs) == 1 and len(bank) == 8 for bank in banks)
    assert sum(bank.nbytes for bank in banks) == used
    changed = tmp_path / "changed"
    methods.edit(folders["VeRA"], changed, lambda t: t["base_model.vera_A"].mul_(2.0))
    multi.add("changed", changed)
    assert all(len(bank.pairs) == 2 for bank in banks)
    inputs = methods.inputs("llama", 3)
    with multi.use(["changed", "again", "copy 5"]):
        ours = plain(**inputs).logits
    multi.detach()
    for i, folder in enumerate((changed, folders["VeRA again"], files["copy 5"])):
        torch.testing.assert_close(ours[i], methods.alone(plain, folder)(**inputs).logits[i], rtol=1e-4, atol=1e-5)
    assert not any(bank.pairs for bank in banks)


def test_room_is_made_for_shared_matrices_once(zoo, methods, tmp_path):
    plain, _ = methods.saved("llama")
    config = peft.VeraConfig(r=300, target_modules=["q_proj"])
    peft.get_peft_model(zoo.copy(plain), config).save_pretrained(tmp_path)
    sizes = []
    for number in (1, 8):
        multi = peftkern.attach_adapters(plain, {str(i): tmp_path for i in range(number)})
        sizes.append([bank.nbytes for bank in multi.banks.values()])
        multi.detach()
    assert sizes[0] == sizes[1] and len(sizes[0]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_matrices_that_a_checkpoint_leaves_to_their_key(zoo, methods, kind, dtype):
    plain, folders = methods.saved(kind, dtype)
    stock = methods.alone(plain, folders["VeRA from its key"]).base_model
    fitted = fit(Checkpoint(folders["VeRA from its key"]), dict(plain.named_modules()), ())
    made = fitted.checkpoint.shared_tensors(fitted.sizes)
    for name in ("vera_A", "vera_B"):
        expected = getattr(stock, name)["default"]
        assert made[name].dtype == dtype and torch.equal(made[name].to(expected), expected)


@pytest.mark.parametrize("name", ["DoRA", "lora_bias", "VeRA", "IA3", "AdaLoRA, pruned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_files_in_half_precision(zoo, methods, tmp_path, name, dtype):
    plain, folders = methods.saved("llama", dtype)
    methods.edit(folders[name], tmp_path / "one", lambda t: t.update({k: v.half() for k, v in t.items()}))
    inputs = methods.inputs("llama", 2)
    with peftkern.attach_adapters(plain, {"one": tmp_path / "one"}).use(["one", None]):
        ours = plain(**inputs).logits[0]
    model = methods.alone(methods.saved("llama", dtype)[0], tmp_path / "one")
    stock = model(**inputs).logits[0]
    zoo.as_accurate(ours, stock, model.double()(**inputs).logits[0])


@torch.no_grad()
def test_a_weight_that_changes_since(zoo, methods):
    """What was computed from it stays until the adapter is added again."""
    plain, folders = methods.saved("llama")
    inputs = methods.inputs("llama", 2)
    multi = peftkern.attach_adapters(plain, {n: folders[n] for n in ("DoRA", "LoRA")})
    plain.model.layers[0].self_attn.v_proj.weight.mul_(3.0)
    stock = [methods.alone(plain, folders[n])(**inputs).logits for n in ("DoRA", "LoRA")]
    with multi.use(["DoRA", "LoRA"]):
        ours = plain(**inputs).logits
    assert (ours[0] - stock[0][0]).abs().max() > 1e-3
    torch.testing.assert_close(ours[1], stock[1][1], rtol=1e-4, atol=1e-5)
    multi.remove("DoRA")
    multi.add("DoRA", folders["DoRA"])
    with multi.use(["DoRA", "LoRA"]):
        torch.testing.assert_close(plain(**inputs).logits[0], stock[0][0], rtol=1e-4, atol=1e-5)


def test_a_model_that_is_not_frozen(zoo, methods):
    """The base's gradient is refused where an adapter acts on the base, and x's is right once it is frozen."""
    plain, folders = methods.saved("llama")
    inputs = methods.inputs("llama", 3)
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
        methods.alone(plain, folders[name])(inputs_embeds=own).logits.square().sum().backward()
        torch.testing.assert_close(embeddings.grad[i], own.grad[0], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_model_that_accelerate_keeps_elsewhere(zoo, methods):
    accelerate = pytest.importorskip("accelerate")
    plain, folders = methods.saved("gpt2")
    names = ["DoRA", "IA3", "lora_bias"]
    inputs = methods.inputs("gpt2", 3)
    with peftkern.attach_adapters(plain, {n: folders[n] for n in names}).use(names):
        expected = plain(**inputs).logits
    plain, _ = methods.saved("gpt2")
    accelerate.cpu_offload(plain, execution_device="cpu")
    with peftkern.attach_adapters(plain, {n: folders[n] for n in names}).use(names):
        torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


def config(**values):
    def change(folder):
        settings = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**settings, **values}))

    return change


@pytest.mark.parametrize(
    "change",
    [config(lora_alpha=-1), config(use_rslora=True, lora_bias=True), config(alpha_pattern={"q_proj": 3}, r=3)],
    ids=["no alpha", "rsLoRA", "patterns"],
)
@torch.no_grad()
def test_settings_of_loras_that_adalora_ignores(zoo, methods, tmp_path, change):
    plain, folders = methods.saved("llama")
    shutil.copytree(folders["AdaLoRA, pruned"], tmp_path / "one")
    change(tmp_path / "one")
    inputs = methods.inputs("llama", 1)
    expected = methods.alone(plain, tmp_path / "one")(**inputs).logits
    with peftkern.attach_adapters(plain, {"one": tmp_path / "one"}).use("one"):
        torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_every_form_is_tested_here(methods):
    _, folders = methods.saved("llama")
    methods = {part.method.name for folder in folders.values() for part in Checkpoint(folder).parts.values()}
    # What has no layer of its own is in test_experts.py.
    assert methods == {m.name for m in METHODS.values() if m.stored is not None and m.layer is not None}


class _InPlace(nn.Module):
    """A model that writes to what its layer gave."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        y = self.layer(x)
        y += x
        return y


@pytest.mark.parametrize("trains", [True, False])
def test_a_model_that_writes_to_what_a_layer_gave(methods, tmp_path, trains):
    torch.manual_seed(0)
    plain, x = _InPlace().requires_grad_(trains), torch.randn(2, 3, 6)
    model = peft.get_peft_model(copy.deepcopy(plain), peft.IA3Config(target_modules=["layer"], feedforward_modules=[]))
    torch.nn.init.normal_(model.base_model.model.layer.ia3_l["default"])
    model.save_pretrained(tmp_path)
    with peftkern.attach_adapters(plain, {"one": tmp_path}).use(["one", None]):
        y = plain(x)
    assert y.requires_grad == trains
    torch.testing.assert_close(y[0], model(x)[0])


@torch.no_grad()
def test_adalora_as_its_training_leaves_it(zoo, methods, tmp_path):
    """The ranks that PEFT's own allocation prunes, and a file whose ranks are those that stay."""
    plain, _ = methods.saved("llama")
    config = peft.AdaLoraConfig(
        init_r=5, target_r=2, tinit=1, tfinal=1, total_step=6, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    model, inputs = peft.get_peft_model(zoo.copy(plain), config), methods.inputs("llama", 2)
    with torch.enable_grad():
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
        for step in range(1, 7):
            model(**inputs).logits.square().mean().backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    ranks = [part.rank for part in Checkpoint(tmp_path).parts.values()]
    assert sum(ranks) == 2 * len(ranks) and len(set(ranks)) > 1
    with peftkern.attach_adapters(plain, {"one": tmp_path}).use("one"):
        ours = plain(**inputs).logits
    torch.testing.assert_close(
        ours, methods.alone(methods.saved("llama")[0], tmp_path)(**inputs).logits, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_one_graph_for_all_methods(zoo, methods):
    plain, folders = methods.saved("llama")
    multi = peftkern.attach_adapters(plain, folders)
    inputs = methods.inputs("llama", 3)
    graph = torch.compile(plain, backend="eager", fullgraph=True)
    for names in (["DoRA", "VeRA", "IA3"], ["LoRA", None, "AdaLoRA, pruned"], ["BEFT", "DeLoRA", "lora_bias"]):
        with multi.use(names):
            assert torch.equal(graph(**inputs).logits, plain(**inputs).logits)
