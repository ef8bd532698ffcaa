"""aLoRA (Greenewald et al. 2025) on a linear layer, as HF PEFT computes it: LoRA on the last tokens of a sequence.

    y_t = x_t W^T + s B (A drop(x_t)) + bias    for the tokens from the invocation of the adapter on
    y_t = x_t W^T + bias                        for those before it, and without an invocation for all

Where the invocation is, a call says by ``alora_offsets``: how many tokens from the end of each sequence, or None.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .. import tuner
from ..linear import Branch, Linear
from ..look import Look
from ..registry import Held, Method, register
from . import lora

INVOCATION = [1, 2]


def acting(offset: int | None, tokens: int) -> int:
    """How many of a sequence's tokens have the adapter."""
    return 0 if offset is None else max(0, min(offset, tokens))


def invoked(adapter: Held) -> Held:
    """The adapter where it acts: LoRA."""
    return adapter._replace(method=lora.LORA)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``lora.Linear`` holds of an aLoRA adapter."""
    return lora.read(look, name, shape, ALORA)


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter where nothing invokes it. As in PEFT it gets gradients then too: zeros."""
    A, B, bias = adapter.tensors
    return lora.with_bias(y, bias, 0.0).add(Branch(A[:0], B[:, :0]))


def _with_offsets(module, args, kwargs):
    # As PEFT's model gives them to its layers: sequences without an invocation, with a short and with an endless one.
    return args, {**kwargs, "alora_offsets": [(None, 2, 100)[i % 3] for i in range(len(args[0]))]}


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    K, N = in_features, out_features

    def model(offsets: bool, **options):
        settings = lora.config(alora_invocation_tokens=INVOCATION, **options)
        made = tuner.layer(nn.Linear(K, N), settings)
        if offsets:
            made.base_model.model[0].register_forward_pre_hook(_with_offsets, with_kwargs=True)
        return made

    return {
        "invoked": model(True),
        "rsLoRA, lora_bias": model(True, use_rslora=True, lora_bias=True),
        "no invocation": model(False),
    }


def build(linear: nn.Linear, R: int) -> nn.Module:
    """What users make, called with offsets."""
    made = tuner.builder("LoraConfig", alora_invocation_tokens=INVOCATION)(linear, R)
    made.base_model.model[0].register_forward_pre_hook(_with_offsets, with_kwargs=True)
    return made


ALORA = register(
    Method(
        name="aLoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.lora.variants.ALoraLinearVariant",
        variant=True,
        held=held,
        apply=apply,
        examples=examples,
        build=build,
        op="multi_lora_linear",
        saves="as LoRA",
        merges="not at all: it acts on some tokens",
        peft_type="LORA",
        loses_small=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
