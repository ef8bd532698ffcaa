"""Models of each kind: the report names every layer that PEFT wrapped, and forward and gradients are PEFT's."""

from __future__ import annotations

import copy

import pytest
import torch

import peftkern
from peftkern.integrations import hf_peft

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

WORDS = 40
TEXT = {
    "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
DECODER = {**TEXT, "num_key_value_heads": 1, "max_position_embeddings": 16}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# Kind -> class of the model, settings, layers to adapt, and parameters to adapt.
KINDS = {
    "BERT": ("BertForSequenceClassification", {**TEXT, **STILL, "num_labels": 3}, ["query", "value", "dense"], []),
    "Llama": ("LlamaForCausalLM", DECODER, ["q_proj", "v_proj", "down_proj", "lm_head"], []),
    "GPT2": (
        "GPT2LMHeadModel",
        {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "embd_pdrop": 0.0,
         "attn_pdrop": 0.0, "resid_pdrop": 0.0},
        ["c_attn", "c_proj"], [],
    ),
    "ViT": (
        "ViTForImageClassification",
        {**TEXT, **STILL, "image_size": 16, "patch_size": 4, "num_labels": 3},
        r".*(projection|q_proj|v_proj|classifier)", [],
    ),
    "Mixtral": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 4}, ["q_proj", "v_proj"], EXPERTS),
    "Qwen3Moe": (
        "Qwen3MoeForCausalLM",
        {**DECODER, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
        ["q_proj", "v_proj"], EXPERTS,
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        {"vocab_size": WORDS, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8,
         "max_source_positions": 12, "max_target_positions": 16, "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "decoder_start_token_id": 1},
        ["q_proj", "v_proj", "fc1", "proj_out"], [],
    ),
}  # fmt: skip
METHODS = {
    "LoRA": lambda **options: peft.LoraConfig(r=4, **options),
    "OFT": lambda **options: peft.OFTConfig(oft_block_size=4, **options),
    "LoKr": lambda **options: peft.LoKrConfig(r=2, **options),
}
# (kind, method) -> the reason why some layers are left to PEFT.
LEFT = {
    ("ViT", "OFT"): "layer type peft.tuners.oft.layer.Conv2d is not covered",
    ("ViT", "LoKr"): "layer type peft.tuners.lokr.layer.Conv2d is not covered",
}
# The library has OFT and LoKr on no Conv1D.
PAIRS = [(kind, method) for kind in KINDS for method in METHODS if kind != "GPT2" or method == "LoRA"]


def _inputs(kind):
    ids = torch.randint(3, WORDS, (3, 7))
    if kind == "ViT":
        return {"pixel_values": torch.randn(3, 3, 16, 16)}
    if kind == "Whisper":
        return {"input_features": torch.randn(3, 8, 24), "decoder_input_ids": ids}
    return {"input_ids": ids}


def _model(kind, method):
    torch.manual_seed(0)
    cls, settings, layers, parameters = KINDS[kind]
    cls = getattr(transformers, cls)
    own = {"target_parameters": parameters, "fan_in_fan_out": kind == "GPT2"} if method == "LoRA" else {}
    config = METHODS[method](target_modules=layers, **own)
    model = peft.get_peft_model(cls(cls.config_class(**settings)), config)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model


def _wrapped(model):
    """Names of PEFT's layers; the wrappers inside of another one of the same module's parameters do not count."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    return [name for name in found if name.rpartition(".base_layer")[0] not in found]


@pytest.mark.parametrize("kind, method", PAIRS)
def test_report_and_gradients(zoo, kind, method):
    stock = _model(kind, method)
    ours = copy.deepcopy(stock)
    report = peftkern.accelerate(ours)
    assert sorted([*report.accelerated, *report.skipped]) == sorted(_wrapped(ours)) and report.accelerated
    assert set(report.skipped.values()) == {LEFT[kind, method]} if (kind, method) in LEFT else not report.skipped
    inputs = _inputs(kind)
    got, wanted = (zoo.loss_and_gradients(model, inputs) for model in (ours, stock))
    torch.testing.assert_close(got[:2], wanted[:2], rtol=1e-4, atol=1e-5)
    assert got[2].keys() == wanted[2].keys() and all(g.any() for g in wanted[2].values())
    largest = max(g.abs().max().item() for g in wanted[2].values())
    for name, g in wanted[2].items():
        torch.testing.assert_close(
            got[2][name], g, rtol=1e-3, atol=1e-5 * largest, msg=lambda m, name=name: f"{name}: {m}"
        )
    status = peftkern.status(ours)
    assert (status.fused, status.stock) == (len(report.accelerated), 0)
    assert all(hf_peft.why_not(ours.get_submodule(name)) == reason for name, reason in report.skipped.items())
