"""A small Llama whose linear layers are quantised: every layer is taken, and trains as stock does."""

from __future__ import annotations

import bitsandbytes
import peft
import pytest
import torch
from peft import LoraConfig
from peft.utils import loftq_utils
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern

from .layers import LIBRARIES, adapted

LAYERS = 14


def llama(library: str) -> nn.Module:
    """The base model, the same at each call; as it was before any library with "dense".

    Rows are whole blocks: of others bitsandbytes multiplies another weight on CPUs.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear) and library != "dense":
                    setattr(part, name, LIBRARIES[library](linear))
    return model


def peft_llama(library: str, **options) -> nn.Module:
    """The same with LoRA on all of these layers."""
    torch.manual_seed(1)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return adapted(llama(library), library, LoraConfig(r=4, target_modules=names, init_lora_weights=False, **options))


def losses(model: nn.Module, steps: int) -> list[float]:
    """Of so many steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(2))
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("library", LIBRARIES)
def test_twenty_steps(library, tmp_path):
    ours, stock = peft_llama(library).train(), peft_llama(library).train()
    report = peftkern.accelerate(ours)
    assert len(report.accelerated) == LAYERS and not report.skipped, str(report)
    found, expected = losses(ours, 20), losses(stock, 20)
    assert found == pytest.approx(expected, rel=2e-5) and expected[-1] < expected[0]
    status = peftkern.status(ours)
    assert status.fused == 20 * LAYERS and not status.stock
    ours.save_pretrained(tmp_path)
    base = llama(library)
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = library.startswith(("nf4", "fp4")), library == "int8"
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    ids = torch.arange(12)[None]
    assert torch.allclose(loaded(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-4)


@pytest.mark.parametrize("library", ["nf4", "int8"])
def test_checkpointing_and_inputs_that_train(library):
    ours, stock = peft_llama(library).train(), peft_llama(library).train()
    for model in (ours, stock):
        peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
    assert len(peftkern.accelerate(ours).accelerated) == LAYERS
    assert losses(ours, 3) == pytest.approx(losses(stock, 3), rel=2e-5)
    assert peftkern.status(ours).fused == 2 * 3 * LAYERS


def test_loftq(tmp_path, monkeypatch):
    # PEFT moves the weight to a GPU before it decomposes what quantising has left: here it is the same on the CPU.
    def begun(qweight, weight, num_bits, reduced_rank):
        residual = weight.float() - bitsandbytes.functional.dequantize_4bit(qweight.data, qweight.quant_state)
        found = loftq_utils._low_rank_decomposition(residual, reduced_rank=reduced_rank)
        return found["R"], found["L"]

    monkeypatch.setattr(loftq_utils, "_loftq_init_new", begun)
    dense, ids = llama("dense"), torch.arange(12)[None]
    dense.save_pretrained(tmp_path)
    models = ours, stock = [peft_llama("nf4", lora_alpha=4).train() for _ in range(2)]
    for model in models:
        peft.replace_lora_weights_loftq(model, str(tmp_path / "model.safetensors"))
    with torch.no_grad():
        exact, (near, plain) = (
            dense(input_ids=ids).logits,
            (m(input_ids=ids).logits for m in (stock, llama("nf4").train())),
        )
    assert (near - exact).norm() < 0.95 * (plain - exact).norm()
    assert len(peftkern.accelerate(ours).accelerated) == LAYERS
    assert losses(ours, 20) == pytest.approx(losses(stock, 20), rel=2e-5)
    assert peftkern.status(ours).fused == 20 * LAYERS
