"""PEANuT (Zhong et al. 2024) on a linear layer, as HF PEFT computes it: a small network on the weight makes lora_A.

    y = x W^T + s B (h x) + bias,    h (R, K) = net(f(A W))

net: h = f(E h) with an (R, R) matrix E ``depth`` times, then as often h = f(D h) with the h before its mirror added. The library
makes the whole change of the weight, B h, and multiplies by it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...autograd.shapes import cast, uncast
from ...autograd.weight.frozen_product import frozen_product
from ...checks import check_parts
from .. import tuner
from ..exact import wide
from ..linear import Branch, Linear, run
from ..look import Look, NotCovered
from ..registry import Held, Method, register


def _with(
    y: Linear, A: Tensor, B: Tensor, layers: Sequence[Tensor], f: Callable[[Tensor], Tensor], scaling: float | Tensor
) -> Linear:
    # layers: encoders and decoders, as many of each.
    h = f(frozen_product(wide(A), y.weight.t()))
    with uncast(A):
        residuals = []
        for encoder in layers[: len(layers) // 2]:
            residuals.append(h)
            h = f(wide(encoder) @ h)
        for decoder in layers[len(layers) // 2 :]:
            h = f(wide(decoder) @ h) + residuals.pop()
    return y.add(Branch(cast(h, B.dtype), B, scaling))


def peanut_linear(
    x: Tensor, weight: Tensor, peanut_A: Tensor, peanut_B: Tensor, *layers: Tensor,
    f: Callable[[Tensor], Tensor] = torch.relu, scaling: float = 1.0, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with PEANuT: the equation at the top of peftkern/methods/derived/peanut.py.

    Args:
        x: (..., K). weight: (N, K). peanut_A: (R, N). peanut_B: (N, R). layers: (R, R), the encoders and then as many
            decoders. f: the activation. bias: (N). dtypes as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does. Saved for backward: x, and (M, R) and some (R, K) in fp32.
    """
    check_parts(
        weight, bias, peanut_A=(peanut_A, "R N"), peanut_B=(peanut_B, "N R"),
        **{f"layers[{i}]": (layer, "R R") for i, layer in enumerate(layers)},
    )  # fmt: skip
    if len(layers) % 2:
        raise ValueError(f"layers are {len(layers)} matrices, expected as many decoders as encoders")
    return run(_with(Linear(weight, bias), peanut_A, peanut_B, layers, f, scaling), x)


def _weight(part: Look | None, name: str) -> Tensor:
    # Of an nn.Linear without a bias.
    if part is None:
        raise NotCovered(f"adapter {name!r} lacks a part")
    part.require(nn.Linear, name)
    if part.tensor("bias") is not None or not tuner.plain_or_none(part.tensor("weight")):
        raise NotCovered(f"a part of {name!r} is no plain matrix")
    return part.tensor("weight")


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``peanut.Linear`` holds of an adapter."""
    depth = look.item("res_num", name)
    ends = [look.part(part).part(name) for part in ("peanut_A", "peanut_B")]
    lists = [look.part(part).part(name) for part in ("peanut_encoders", "peanut_decoders")]
    layers = [each.part(str(i)) for each in lists for i in range(depth)]
    tensors = tuple(_weight(part, name) for part in (*ends, *layers))
    if len({t.dtype for t in tensors}) > 1:
        raise NotCovered(f"the tensors of {name!r} differ in dtype")
    numbers = look.item("act_fn", name), tuner.number(look.item("scaling", name), name)
    return Held(name, PEANUT, tensors, numbers, rank=tensors[0].shape[0])


@functools.cache
def _activation(name: str) -> Callable[[Tensor], Tensor]:
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    (A, B, *layers), (activation, scaling) = adapter.tensors, adapter.numbers
    return _with(y, A, B, layers, _activation(activation), scaling)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(**options):
        return peft.PeanutConfig(**{"target_modules": ["0"], "r": 4, "init_weights": False, **options})

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias, deep": tuner.layer(nn.Linear(K, N, bias=False), config(depth=2, act_fn="tanh")),
        "shallow": tuner.layer(nn.Linear(K, N), config(depth=0, scaling=0.5)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(r=3, act_fn="gelu")),
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
        saves="x, (M, R) in fp32, and (R, K) for each layer of its network",
        merges="W + s B h",
        peft_type="PEANUT",
        loses_small=True,
        makes=True,
        dense=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
