"""Checkpoints of every method for two tiny models, made once, and what stock PEFT makes of them."""

import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftkern.integrations.attach.weights import SAFETENSORS

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


@pytest.fixture(scope="session")
def checkpoints_made(tmp_path_factory):
    """(kind, dtype) -> (plain model, {name: folder}), made once."""
    return {}, tmp_path_factory.mktemp("methods")


@pytest.fixture
def methods(zoo, checkpoints_made):
    """What the tests of several methods share. ``saved(kind, dtype)``: a copy of the plain model, and {name: folder}."""
    models, root = checkpoints_made

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

    return SimpleNamespace(
        saved=make, alone=lambda *args: _alone(zoo, *args), inputs=lambda *args: _inputs(zoo, *args), edit=_edit
    )


def _alone(zoo, plain, folder):
    """The model with this adapter alone, as stock PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(zoo.copy(plain), folder).eval()


def _edit(folder, into, change):
    """The folder with other tensors."""
    if into != folder:
        shutil.copytree(folder, into)
    new = load_file(folder / SAFETENSORS)
    change(new)
    save_file(new, into / SAFETENSORS)


def _inputs(zoo, kind, rows):
    return {k: v for k, v in zoo.batch(kind, rows=rows).items() if k != "labels"}
