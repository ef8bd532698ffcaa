"""Lily (Zhong et al. 2024) on a linear layer, as HF PEFT computes it: lora_B is mixed of several, by what the batch is.

    y = x W^T + s * u C + bias,    u = x A^T,    C = sum over e of p[e] B[e]

p (E) is the mean over all rows of softmax(u router^T). A (R, K) is shared by neighbouring layers, B (E, R, N) by all of
one kind, router (E, R) is the layer's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...autograd.maps.kron import add_kron
from ...bases.base import Base
from ...checks import accumulate_dtype
from .. import tuner
from ..linear import Branch, Linear, frozen_weight, run
from ..look import Look, NotCovered
from ..registry import Held, Method, register


def _branch(x: Tensor, A: Tensor, B: Tensor, router: Tensor, scaling: float) -> Branch:
    (R, K), E = A.shape, router.shape[0]
    if x.shape[-1:] != (K,):
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {K})")
    if x.dtype == A.dtype:
        u = F.linear(x, A)
    else:  # which would keep a wider copy of x
        u = add_kron(A.new_zeros(*x.shape[:-1], R, dtype=accumulate_dtype(x.dtype)), x, A.new_ones(1, 1), A)
    p = torch.softmax(F.linear(u, router.to(u.dtype)), -1).reshape(-1, E).mean(0)
    C = (p.to(B.dtype) @ B.reshape(E, -1)).view(R, -1)
    return Branch(A, C.t().to(B.dtype), scaling)


def _with(y: Linear, A: Tensor, B: Tensor, router: Tensor, scaling: float) -> Linear:
    return y.add_made(partial(_branch, A=A, B=B, router=router, scaling=scaling))


def lily_linear(
    x: Tensor, weight: Tensor | Base, lily_A: Tensor, lily_B: Tensor, lily_router: Tensor, *, bias: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with Lily: the equation at the top of peftkern/methods/derived/lily.py.

    Args:
        x: (..., K). weight: (N, K). bias: (N). lily_A: (R, K). lily_B: (E R, N). lily_router: (E, R).

    Returns (..., N), where rows depend on each other. Raises as ``lora_linear`` does.
    """
    weight = frozen_weight(
        weight, bias, lily_A=(lily_A, "R K"), lily_B=(lily_B, "ER N"), lily_router=(lily_router, "E R")
    )
    if len(lily_B) != lily_router.numel():
        raise ValueError(
            f"lily_B has shape {tuple(lily_B.shape)}, expected (E R, N) with E, R = {tuple(lily_router.shape)}"
        )
    return run(_with(Linear(weight, bias), lily_A, lily_B, lily_router, scaling), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``lily.Linear`` holds of an adapter."""
    tensors = []
    for of in ("lily_A", "lily_B", "lily_router"):
        part = look.part(of).part(name)
        if part is None:
            raise NotCovered(f"adapter {name!r} lacks a part")
        part.require(nn.Linear, of)
        tensors.append(part.tensor("weight"))
    if len({t.dtype for t in tensors}) > 1:
        raise NotCovered(f"the tensors of {name!r} differ in dtype")
    scaling = tuner.number(look.item("scaling", name), name)
    if isinstance(scaling, Tensor):
        raise NotCovered(f"the scaling of {name!r} is a tensor")
    return Held(name, LILY, tuple(tensors), (scaling,), rank=tensors[0].shape[0])


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return _with(y, *adapter.tensors, *adapter.numbers)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(**options):
        return peft.LilyConfig(**{"target_modules": ["0"], "r": 4, "num_B": 3, "init_weights": False, **options})

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config(stride_A=1)),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(r=7, num_B=2, scaling=0.5)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(r=5, num_B=4)),
    }


LILY = register(
    Method(
        name="Lily",
        taxonomy="reparameterised",
        family="S",
        layer="peft.tuners.lily.layer.Linear",
        adapters="lily_A",
        held=held,
        apply=apply,
        function=lily_linear,
        examples=examples,
        build=tuner.builder("LilyConfig", num_B=4),
        op="lora_linear",
        saves="x, and (M, 2 R + E) in fp32",
        merges="not at all: a batch has its own",
        peft_type="LILY",
        tested={"peft": ((0, 21), (0, 21))},
    )
)
