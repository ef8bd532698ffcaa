"""LoRA and rsLoRA (Hu et al. 2021) on a linear layer, as HF PEFT's ``lora.Linear`` computes them.

y = x W^T + bias + sum over adapters of s * (B (A drop(x)) + bias_B)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..autograd.lora_linear import lora_linear
from ..checks import accumulate_dtype
from . import tuner
from .look import PLAIN_TENSORS, Look, NotCovered
from .registry import Branch, Method, Plan, register


def _branch(look: Look, name: str, N: int, K: int) -> Branch:
    variants = look.module.lora_variant
    if name in variants:
        raise NotCovered(f"adapter {name!r} is a LoRA variant ({type(variants[name]).__name__})")
    look.item("lora_variant", name)
    down, up, dropout = (look.part(part).part(name) for part in ("lora_A", "lora_B", "lora_dropout"))
    if up is None or dropout is None:
        raise NotCovered(f"adapter {name!r} lacks a part")
    try:
        down.require(nn.Linear, "lora_A")
        up.require(nn.Linear, "lora_B")
        p = tuner.drop_probability(dropout, name)
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
    return Branch(name, A, B, bias, tuner.number(look.item("scaling", name), name), p)


def plan(look: Look, mixed: Iterable[str] | None = None) -> Plan:
    """What a call of this layer computes; ``mixed``: the adapters of a batch in which each row takes one of them."""
    tuner.check_state(look)
    weight, bias = tuner.base(look)
    return Plan(weight, bias, [_branch(look, name, *weight.shape) for name in tuner.adapters(look, "lora_A", mixed)])


def _folded_bias(x: Tensor, bias: Tensor | None, branches: list[Branch]) -> Tensor | None:
    # lora_bias is part of the branch, so it is scaled: beta = bias + sum s * bias_B, O(N) and left to
    # autograd.
    dtype = accumulate_dtype(x.dtype)
    for b in branches:
        if b.bias is not None:
            term = b.bias.to(dtype) * (b.scaling.to(dtype) if isinstance(b.scaling, Tensor) else b.scaling)
            bias = term if bias is None else bias.to(dtype) + term
    return bias


def _stacked(x: Tensor, branches: list[Branch]) -> dict:
    # Adapters without dropout add up to one adapter: ranks one below the other, scalings as a rank scale.
    lora_A = torch.cat([b.lora_A for b in branches], dim=0)
    lora_B = torch.cat([b.lora_B for b in branches], dim=1)
    scalings = [b.scaling for b in branches]
    if not any(isinstance(s, Tensor) for s in scalings) and all(s == scalings[0] for s in scalings):
        return {"lora_A": lora_A, "lora_B": lora_B, "scaling": scalings[0]}
    dtype = accumulate_dtype(x.dtype)
    pieces = [
        b.scaling.to(dtype).reshape(1).expand(b.lora_A.shape[0])
        if isinstance(b.scaling, Tensor)
        else x.new_full((b.lora_A.shape[0],), b.scaling, dtype=dtype)
        for b in branches
    ]
    return {"lora_A": lora_A, "lora_B": lora_B, "rank_scale": torch.cat(pieces)}


def run(layer: nn.Module, plan: Plan, x: Tensor) -> Tensor:
    """y of the layer: one fused call, but for further adapters that drop."""
    weight, bias, branches = plan
    if len(branches) > 1 and all(b.dropout_p == 0.0 for b in branches):
        return lora_linear(x, weight, **_stacked(x, branches), bias=_folded_bias(x, bias, branches))
    # Masks are independent, so at most one adapter that drops can share the op with the base: one that
    # drops, since that costs PEFT's code the most memory. The others (a rare setting) are added as PEFT
    # computes them.
    fused = branches[0] if len(branches) == 1 else next(b for b in branches if b.dropout_p > 0.0)
    if fused.bias is not None:
        bias = _folded_bias(x, bias, [fused])
    p = fused.dropout_p
    y = lora_linear(
        x, weight, fused.lora_A, fused.lora_B, bias=bias, scaling=fused.scaling, dropout_p=p, training=p > 0.0
    )
    if len(branches) == 1:
        return y
    result = y
    for b in branches:
        if b is not fused:
            dropped = layer.lora_dropout[b.name](layer._cast_input_dtype(x, b.lora_A.dtype))
            result = result + layer.lora_B[b.name](layer.lora_A[b.name](dropped)) * b.scaling
    return result.to(y.dtype)


def examples(in_features: int, out_features: int) -> dict[str, nn.Module]:
    """PEFT models of one layer."""
    import peft
    from transformers.pytorch_utils import Conv1D

    def model(linear: nn.Module, *more: dict, **options) -> nn.Module:
        options = {"target_modules": ["0"], "r": 4, "lora_alpha": 6, "init_lora_weights": False, **options}
        model = peft.get_peft_model(nn.Sequential(linear), peft.LoraConfig(**options))
        for name, changed in enumerate(more):
            model.add_adapter(str(name), peft.LoraConfig(**{**options, **changed}))
        model.base_model.set_adapter(list(model.peft_config))
        return model

    K, N = in_features, out_features
    return {
        "linear": model(nn.Linear(K, N)),
        "no bias, rsLoRA": model(nn.Linear(K, N, bias=False), use_rslora=True),
        "lora_bias": model(nn.Linear(K, N), lora_bias=True),
        "Conv1D": model(Conv1D(N, K), fan_in_fan_out=True),
        "two adapters": model(nn.Linear(K, N), {"r": 7, "lora_alpha": 3}),
    }


def build(linear: nn.Linear, rank: int) -> nn.Module:
    """PEFT's model of this layer alone."""
    import peft

    return peft.get_peft_model(nn.Sequential(linear), peft.LoraConfig(target_modules=["0"], r=rank, lora_alpha=rank))


LORA = register(
    Method(
        name="LoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.lora.layer.Linear",
        plan=plan,
        run=run,
        examples=examples,
        build=build,
        op="lora_linear",
        mixed=True,
        saves="x if lora_A trains, and (M, R) in fp32",
        merges="W + s B A",
        peft_type="LORA",
        tested={"peft": ((0, 18), (0, 21))},
    )
)
