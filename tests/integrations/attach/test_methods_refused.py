"""Checkpoints of every method that do not fit are refused with file, key and reason, and nothing changes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftkern
from peftkern.integrations.attach.checkpoint import CONFIG
from peftkern.integrations.attach.weights import SAFETENSORS

L = "base_model.model.model.layers.0.self_attn.k_proj"


def tensors(change):
    def apply(folder):
        new = load_file(folder / SAFETENSORS)
        change(new)
        save_file(new, folder / SAFETENSORS)

    return apply


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
def test_refused_and_nothing_changes(methods, tmp_path, case):
    name, change, text = WRONG[case]
    plain, folders = methods.saved("llama")
    shutil.copytree(folders[name], tmp_path / "one")
    change(tmp_path / "one")
    multi = peftkern.attach_adapters(plain, {"IA3": folders["IA3"]})
    with pytest.raises(ValueError) as caught:
        multi.add("one", tmp_path / "one")
    assert str(tmp_path / "one") in str(caught.value) and text in str(caught.value), caught.value
    assert multi.names == ["IA3"] and all(bank.names == ["IA3#0"] for bank in multi.banks.values())
