"""PEANuT (Zhong et al. 2024) on a linear layer, as HF PEFT computes it: the change is a small network's answer to the weight.

    y = x W^T + s * B (H^T x) + bias,    H = net(W^T A^T)  (K, R)

    net: h = act(.), then act(E_i h) of each encoder and act(D_i h) + the encoder's input of each decoder, last to first

A (R, N) and B (N, R) train, and encoders and decoders (R, R). The network's last layer is linear, so the change of the
weight is a branch of rank R whose A is H^T: neither it nor its product with x is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...autograd.frozen_product import frozen_product
from .. import tuner
from ..linear import Branch, Linear, run
from ..look import Look, NotCovered
from ..registry import Held, Method, loaded, register

_TABLE = "transformers.activations.ACT2FN"


def with_peanut(
    y: Linear, tensors: Sequence[Tensor], scaling: float, act: Callable[[Tensor], Tensor]
) -> Linear:  # fmt: skip
    """The layer with A, B, encoders and as many decoders."""
    A, B, *coders = tensors
    depth = len(coders) // 2
    W = y.weight.t()
    h, inputs = act((F.linear(A, W) if A.dtype == W.dtype else frozen_product(A, W)).t()), []
    for E in coders[:depth]:
        inputs.append(h)
        h = act(F.linear(h, E))
    for D in coders[depth:]:
        h = act(F.linear(h, D)) + inputs.pop()
    return y.add(Branch(h.t().to(B.dtype), B, scaling))


def peanut_linear(
    x: Tensor, weight: Tensor, peanut_A: Tensor, peanut_B: Tensor, *coders: Tensor, bias: Tensor | None = None,
    scaling: float = 1.0, act: Callable[[Tensor], Tensor] = torch.relu,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with PEANuT: the equation at the top of peftkern/methods/derived/peanut.py.

    Args:
        x: (..., K). weight: (N, K). peanut_A: (R, N). peanut_B: (N, R). coders: (R, R) each, encoders first, then as many
            decoders. bias: (N). act: entry by entry.

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    return run(with_peanut(Linear(weight, bias), (peanut_A, peanut_B, *coders), scaling, act), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``peanut.Linear`` holds of an adapter."""
    parts = [look.part(f"peanut_{one}").part(name) for one in "AB"]
    for many in ("peanut_encoders", "peanut_decoders"):
        coders = look.part(many).part(name)
        parts += [coders.part(str(i)) for i in range(look.item("depth", name))]
    for part in parts:
        if part is None:
            raise NotCovered(f"adapter {name!r} lacks a part")
        part.require(nn.Linear, f"a part of {name!r}")
    tensors = tuple(part.tensor("weight") for part in parts)
    scaling = tuner.number(look.item("scaling", name), name)
    if isinstance(scaling, Tensor):
        raise NotCovered(f"the scaling of {name!r} is a tensor")
    return Held(name, PEANUT, tensors, (scaling, look.item("act_fn", name)), rank=tensors[1].shape[1])


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    scaling, act = adapter.numbers
    return with_peanut(y, adapter.tensors, scaling, loaded(_TABLE)[act])


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(**options):
        return peft.PeanutConfig(**{"target_modules": ["0"], "r": 5, "init_weights": False, **options})

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config(scaling=0.7)),
        "no bias, coders": tuner.layer(nn.Linear(K, N, bias=False), config(depth=2, act_fn="gelu")),
        "two adapters": tuner.layer(nn.Linear(K, N), config(act_fn="tanh"), config(r=3, depth=1, act_fn="silu")),
    }


PEANUT = register(
    Method(
        name="PEANuT",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.peanut.layer.Linear",
        adapters="peanut_A",
        held=held,
        apply=apply,
        function=peanut_linear,
        examples=examples,
        build=tuner.builder("PeanutConfig"),
        rank=32,
        op="lora_linear",
        saves="x, (M, R) in fp32, and the network's (K, R)",
        merges="W + s B H^T",
        peft_type="PEANUT",
        tested={"peft": ((0, 21), (0, 21))},
    )
)
