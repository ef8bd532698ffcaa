"""LoRA on the weights of a mixture's experts (``target_parameters``), each of which is a LoRA layer of its own rows.

    y_t = x_t (W[e] + s B[e] A[e])^T + bias[e],      e the expert of row t

``expert_lora_linear`` is its function. HF PEFT's wrappers of parameters are no layers with an input of their own: what is read
of them, and around which modules, is peftkern/integrations/hf_peft/experts.py's affair.
"""

from __future__ import annotations

from torch import nn

from .. import lora_stored, tuner
from ..registry import Method, register
from .lora import apply


def build(experts: nn.Module, rank: int) -> nn.Module:
    """A model of this module alone, with LoRA of this rank on every weight of its experts."""
    import peft

    weights = [f"0.{name}" for name, p in experts.named_parameters() if p.dim() == 3]
    return tuner.layer(experts, peft.LoraConfig(r=rank, target_parameters=weights))


EXPERTS = register(
    Method(
        name="LoRA of experts",
        of="LoRA",
        taxonomy="reparameterised",
        family="L",
        layer=None,
        apply=apply,
        build=build,
        rank=8,
        op="lora_linear",
        saves="x of the experts that have rows if lora_A trains, and (M, R) in fp32",
        merges="W + s B A",
        peft_type="LORA",
        stored=lora_stored.EXPERTS,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
