"""KaSA (Wang et al. 2024) on a linear layer, as HF PEFT computes it: LoRA with a diagonal between its matrices.

    y = x W^T + s B (t * (A drop(x))) + bias,    t (R) the update of the singular values

Making the adapter has taken the last R singular values of W off, for good.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .. import tuner
from ..linear import Branch, Linear
from ..look import Look, NotCovered
from ..registry import Held, Method, register
from . import lora


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``lora.Linear`` holds of a KaSA adapter: LoRA's tensors, and the diagonal."""
    if name in look.module._lora_kasa_truncation_deferred:
        raise NotCovered(f"the base weight of {name!r} is not truncated yet")
    adapter = lora.read(look, name, shape, KASA)
    (diagonal,) = tuner.tensors(look, name, {"lora_diag": (adapter.rank,)})
    return adapter._replace(tensors=(*adapter.tensors, diagonal))


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    (A, B, bias, diagonal), (scaling,) = adapter.tensors, adapter.numbers
    y = lora.with_bias(y, bias, scaling)
    return y.add(Branch(A, B, scaling, adapter.dropout_p, d=diagonal))


def build(linear: nn.Linear, rank: int) -> nn.Module:
    """A model of one layer around this one. One singular value of W has to stay."""
    import peft

    return tuner.builder("LoraConfig", kasa_config=peft.KasaConfig())(
        linear, min(rank, *(n - 1 for n in linear.weight.shape))
    )


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    K, N = in_features, out_features
    kasa = peft.KasaConfig()
    return {
        "linear": tuner.layer(nn.Linear(K, N), lora.config(kasa_config=kasa)),
        "no bias, rsLoRA": tuner.layer(nn.Linear(K, N, bias=False), lora.config(kasa_config=kasa, use_rslora=True)),
    }


KASA = register(
    Method(
        name="KaSA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.lora.variants.KasaLinearVariant",
        variant=True,
        held=held,
        apply=apply,
        examples=examples,
        build=build,
        op="lora_linear",
        coefficients=("d",),
        saves="x if lora_A trains, and (M, R) in fp32",
        merges="W + s B diag(t) A",
        tested={"peft": ((0, 21), (0, 21))},
    )
)
