"""Uni-LoRA on a linear layer, as HF PEFT computes it: LoRA whose matrices are gathered from one vector.

    y = x W^T + B (A drop(x)) + bias,    A = theta[i_A] * c_A,  B = theta[i_B] * c_B

theta (D) trains, for all layers together; the indices i and the factors c are fixed.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...bases.base import Base
from ...ops.dropout_mask import acting
from .. import tuner
from ..linear import Branch, Linear, frozen_weight, run
from ..look import Look
from ..registry import Held, Method, register


def unilora_linear(
    x: Tensor, weight: Tensor | Base, unilora_theta_d: Tensor, unilora_indices_A: Tensor, unilora_indices_B: Tensor,
    unilora_scales_A: Tensor, unilora_scales_B: Tensor, *, bias: Tensor | None = None, dropout_p: float = 0.0,
    training: bool = False, seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with Uni-LoRA: the equation at the top of peftkern/methods/derived/unilora.py.

    Args:
        x: (..., K). weight: (N, K). unilora_theta_d: (D). unilora_indices_A, unilora_scales_A: (R, K).
            unilora_indices_B, unilora_scales_B: (N, R). bias, dropout_p, training, seed: as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    weight = frozen_weight(
        weight, bias, unilora_theta_d=(unilora_theta_d, "D"),
        unilora_indices_A=(unilora_indices_A, "R K", unilora_theta_d.shape),
        unilora_indices_B=(unilora_indices_B, "N R", unilora_theta_d.shape),
        unilora_scales_A=(unilora_scales_A, "R K"), unilora_scales_B=(unilora_scales_B, "N R"),
    )  # fmt: skip
    tensors = unilora_theta_d, unilora_indices_A, unilora_indices_B, unilora_scales_A, unilora_scales_B
    return run(Linear(weight, bias).add(_branch(tensors, acting(dropout_p, training), seed)), x)


def _branch(tensors: tuple[Tensor, ...], dropout_p: float, seed: int | Tensor | None = None) -> Branch:
    theta, i_A, i_B, c_A, c_B = tensors
    return Branch(theta[i_A] * c_A, theta[i_B] * c_B, 1.0, dropout_p, seed=seed)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``unilora.Linear`` holds of an adapter."""
    theta, c_A, c_B = tuner.tensors(
        look, name, dict.fromkeys(("unilora_theta_d", "unilora_scales_A", "unilora_scales_B"))
    )
    i_A, i_B = tuner.tensors(look, name, {"unilora_indices_A": (None, shape[1]), "unilora_indices_B": (shape[0], None)})
    p = tuner.drop_probability(look, "unilora_dropout", name)
    return Held(name, UNILORA, (theta, i_A, i_B, c_A, c_B), dropout_p=p, rank=i_A.shape[0])


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return y.add(_branch(adapter.tensors, adapter.dropout_p))


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(**options):
        return peft.UniLoraConfig(
            **{"target_modules": ["0"], "theta_d_length": 50, "init_theta_d_bound": 1.0, **options}
        )

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(r=7)),
    }


UNILORA = register(
    Method(
        name="Uni-LoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.unilora.layer.Linear",
        adapters="unilora_indices_A",
        held=held,
        apply=apply,
        function=unilora_linear,
        examples=examples,
        build=tuner.builder("UniLoraConfig"),
        op="lora_linear",
        saves="x, (M, R) in fp32, and the gathered A and B",
        merges="W + B A",
        peft_type="UNILORA",
        keeps_dtype=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
