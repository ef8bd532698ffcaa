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


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_each_row_is_peft_s(served, kind, implementation):
    plain, folders, stock = served(kind, implementation)
    multi = peftkern.attach_adapters(plain, folders)
    ids = torch.randint(40, (len(NAMES), 7))
    wanted = _rows(stock, NAMES, ids)
    assert (wanted[0] - stock[None](input_ids=ids[:1]).logits).abs().max() > 0.1
    for _ in range(2):  # followed, then remembered
        with multi.use(NAMES):
            torch.testing.assert_close(plain(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert len(multi.layouts) == 1
    for name in ("both", "one"):
        with multi.use(name):
            got = plain(input_ids=ids).logits
        torch.testing.assert_close(got, _rows(stock, [name] * len(ids), ids), rtol=1e-4, atol=1e-4)
    assert torch.equal(plain(input_ids=ids).logits, stock[None](input_ids=ids).logits)
