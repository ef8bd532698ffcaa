"""Experts modules of transformers whose parameters PEFT adapts, without the model around them."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

E, K, INNER, TOP = 5, 16, 24, 2  # in half precision grouped_mm wants rows of 16 bytes
# What is special -> module and class.
KINDS = {
    "gate": "mixtral.MixtralExperts",
    "transposed, bias, interleaved": "gpt_oss.GptOssExperts",
    "transposed": "aria.AriaExperts",
    "no gate": "nemotron_h.NemotronHExperts",
    "norm": "muse_spark.MuseSparkExperts",
    "wide": "openai_privacy_filter.OpenAIPrivacyFilterExperts",
}
UP = {"no gate": "up_proj"}


class Block(nn.Module):
    """Passes a call on, as the layers of a model do."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, x, index, weights):
        return self.experts(x, index, weights)


def block(kind="gate", implementation="eager"):
    """A block around experts, filled with random numbers."""
    module, _, cls = KINDS[kind].partition(".")
    sizes = {
        **dict.fromkeys(("hidden_size", "moe_hidden_size"), K),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INNER),
        **dict.fromkeys(("num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    }
    config = SimpleNamespace(
        **sizes, hidden_act="silu", mlp_hidden_act="relu2", swiglu_alpha=1.7, swiglu_limit=7.0, moe_latent_size=None,
        post_norm_eps=1e-5, _experts_implementation=implementation,
    )  # fmt: skip
    made = Block(getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), cls)(config))
    for p in made.parameters():
        nn.init.normal_(p, std=0.4)
    return made


def adapted(made, *targets, **options):
    """PEFT's model of a block with an adapter that is not zero."""
    names = [f"experts.{t}" for t in targets]
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 4, "init_lora_weights": False, **options}, target_parameters=names
    )
    return peft.get_peft_model(made, config)


def both(kind="gate", implementation="eager", dtype=torch.float32, **options):
    """The same with both projections adapted."""
    return adapted(block(kind, implementation).to(dtype), UP.get(kind, "gate_up_proj"), "down_proj", **options)


def call(tokens=9, dtype=torch.float32, experts=E):
    """Arguments of a call: tokens, their experts, and the weights of those. The last expert gets no token."""
    weights, index = torch.randn(tokens, experts)[:, :-1].softmax(-1).topk(TOP)
    return torch.randn(tokens, K, dtype=dtype), index, weights.to(dtype)


def step(model, x, index, weights, grad):
    """Output and all gradients by name."""
    model.zero_grad()
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = model(x, index, weights)
    y.backward(grad.to(y.dtype))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, **found}


@pytest.fixture
def moe():
    """What the tests of this folder share."""
    return SimpleNamespace(block=block, adapted=adapted, both=both, call=call, step=step, experts=E, columns=K)
