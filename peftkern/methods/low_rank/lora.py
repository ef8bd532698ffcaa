"""LoRA and rsLoRA (Hu et al. 2021, Kalajdzievski 2023) on a linear layer, as HF PEFT's ``lora.Linear`` computes them.

y = x W^T + bias + sum over adapters of s * (B (A drop(x)) + bias_B),    s = alpha / r, or alpha / sqrt(r) for rsLoRA
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...autograd.lora_linear import Options, lora_linear_with
from .. import lora_stored, tuner
from ..linear import Branch, Linear, run, wide_scaling
from ..look import PLAIN_TENSORS, Look, NotCovered
from ..registry import Held, Method, register, variant_of


def variant(look: Look, name: str) -> Method | None:
    """The entry of the variant of LoRA that an adapter of a layer is, None for plain LoRA."""
    kind = look.item("lora_variant", name)
    method = None if kind is None else variant_of(type(kind))
    if kind is not None and method is None:
        raise NotCovered(f"adapter {name!r} is a LoRA variant ({type(kind).__name__})")
    return method


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``lora.Linear`` holds of an adapter: plain LoRA, or a variant of it that has an entry of its own."""
    method = variant(look, name)
    return read(look, name, shape, LORA) if method is None else method.held(look, name, shape)


def read(look: Look, name: str, shape: tuple[int, int], method: Method) -> Held:
    """lora_A, lora_B and its bias, the scaling and the dropout of an adapter, for a method that has them."""
    (N, K), down, up = shape, look.part("lora_A").part(name), look.part("lora_B").part(name)
    if up is None:
        raise NotCovered(f"adapter {name!r} lacks a part")
    try:
        down.require(nn.Linear, "lora_A")
        up.require(nn.Linear, "lora_B")
        p = tuner.drop_probability(look, "lora_dropout", name)
    except NotCovered as reason:
        raise NotCovered(f"{reason} (adapter {name!r})") from None
    A, B, bias = down.tensor("weight"), up.tensor("weight"), up.tensor("bias")
    if type(A) not in PLAIN_TENSORS or type(B) not in PLAIN_TENSORS or not tuner.plain_or_none(bias):
        raise NotCovered(f"a weight of {name!r} is not a plain tensor")
    if down.tensor("bias") is not None:
        raise NotCovered(f"lora_A of {name!r} has a bias")
    a, b = A.shape, B.shape
    if len(a) != 2 or len(b) != 2 or a[1] != K or b[0] != N or a[0] != b[1]:
        raise NotCovered(f"the shapes of {name!r} do not fit: lora_A {tuple(a)}, lora_B {tuple(b)}")
    if A.dtype != B.dtype:
        raise NotCovered(f"lora_A and lora_B of {name!r} differ in dtype")
    if bias is not None and bias.dtype != B.dtype:
        raise NotCovered(f"lora_B of {name!r} and its bias differ in dtype")
    scaling = tuner.number(look.item("scaling", name), name)
    return Held(name, method, (A, B, bias), (scaling,), p, a[0])


def with_bias(y: Linear, bias: Tensor | None, scaling: float | Tensor) -> Linear:
    """The layer with lora_bias, which is part of the branch, so it is scaled."""
    return y if bias is None else y.add_bias(wide_scaling(bias, bias) * wide_scaling(scaling, bias))


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    (A, B, bias), (scaling,) = adapter.tensors, adapter.numbers
    return with_bias(y, bias, scaling).add(Branch(A, B, scaling, adapter.dropout_p))


def alone(weight: Tensor, bias: Tensor | None, adapter: Held, x: Tensor) -> Tensor:
    """y of a layer with this adapter alone."""
    _, _, (A, B, branch_bias), (scaling,), p, *_ = adapter
    if branch_bias is not None:
        return run(apply(Linear(weight, bias), adapter), x)
    return lora_linear_with(x, weight, A, B, bias, Options(scaling, p))


def config(**options):
    """PEFT's config of adapters that are not zero."""
    import peft

    return peft.LoraConfig(**{"target_modules": ["0"], "r": 4, "lora_alpha": 6, "init_lora_weights": False, **options})


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    from transformers.pytorch_utils import Conv1D

    K, N = in_features, out_features
    frozen = tuner.layer(nn.Linear(K, N), config())
    frozen.base_model.model[0].lora_A.requires_grad_(False)
    return {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "rsLoRA, no bias": tuner.layer(nn.Linear(K, N, bias=False), config(use_rslora=True)),
        "lora_bias": tuner.layer(nn.Linear(K, N), config(lora_bias=True)),
        "lora_A frozen": frozen,
        "Conv1D": tuner.layer(Conv1D(N, K), config(fan_in_fan_out=True)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(r=7, lora_alpha=3)),
    }


LORA = register(
    Method(
        name="LoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.lora.layer.Linear",
        also=(
            "peft.tuners.lora.bnb.Linear8bitLt",
            "peft.tuners.lora.bnb.Linear4bit",
            "peft.tuners.lora.hqq.HqqLoraLinear",
            "peft.tuners.lora.torchao.TorchaoLoraLinear",
        ),
        adapters="lora_A",
        held=held,
        apply=apply,
        alone=alone,
        examples=examples,
        build=tuner.builder("LoraConfig"),
        op="lora_linear",
        nests=True,
        saves="x if lora_A trains, and (M, R) in fp32",
        merges="W + s B A",
        peft_type="LORA",
        stored=lora_stored.LORA,
        tested={"peft": ((0, 18), (0, 21)), "adapters": ((1, 3), (1, 3))},
    )
)
