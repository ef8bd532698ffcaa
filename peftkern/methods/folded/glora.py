"""GLoRA (Chavan et al. 2023) on a linear layer, as HF PEFT computes it.

    y = x (W + W * A + B)^T + b + b * D + E + W C

A and B: (N, K) of low rank, columns (N, 1), or single numbers. C: (K, 1), of low rank or whole. D, E: (N), or single numbers.
Without a bias there are no C, D and E. What is left out is zero. The weight is folded in W's own dtype, as in the library, in
which A to E are rounded to it one by one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...autograd.shapes import cast
from ...autograd.weight.frozen_product import frozen_product
from .. import tuner
from ..exact import product, wide
from ..linear import Linear
from ..look import Look, NotCovered
from ..registry import Held, Method, loaded, register

_LAYER = "peft.tuners.glora.layer."
# The tensors of a path, by the name of its class.
_PATHS = {"GloraLoraPath": ("Xd", "Xu"), "GloraVectorPath": ("X",), "GloraScalarPath": ("X",), "GloraEmptyPath": ()}


def _path(look: Look, part: str, name: str) -> tuple[Tensor, ...]:
    path = look.part(f"glora_{part}").part(name)
    for cls, tensors in _PATHS.items():
        if type(path.module) is loaded(_LAYER + cls):
            path.require(type(path.module), f"glora_{part}")
            return tuple(path.tensor(t) for t in tensors)
    raise NotCovered(f"glora_{part} of {name!r} is a {type(path.module).__name__}")


def _matrix(tensors: tuple[Tensor, ...]) -> Tensor | None:
    # What a path stands for, None for zero.
    return product(*tensors) if len(tensors) == 2 else wide(tensors[0]) if tensors else None


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``glora.GloraLinear`` holds of an adapter: the tensors of A to E, and how many each of them has."""
    paths = [_path(look, part, name) for part in "ABCDE"]
    tensors = sum(paths, ())
    if not tensors:
        raise NotCovered(f"{name!r} has no tensors")
    return Held(name, GLORA, tensors, tuple(map(len, paths)))


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    left = list(adapter.tensors)
    A, B, C, D, E = (_matrix(tuple(left.pop(0) for _ in range(count))) for count in adapter.numbers)
    W, b = y.weight, y.bias
    change = B if A is None else W * A if B is None else W * A + B
    if change is not None:
        y = y.fold(cast(change, W.dtype))
    if b is None:
        return y
    terms = [E, None if D is None else b * D, None if C is None else frozen_product(C.t(), W).squeeze(0)]
    for term in terms:
        if term is not None:
            y = y.add_bias(term.expand(b.shape))
    return y


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(**options):
        return peft.GloraConfig(**{"target_modules": ["0"], "r": 4, "init_weights": False, **options})

    K, N = in_features, out_features
    vectors = {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}
    models = {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config()),
        "vectors": tuner.layer(nn.Linear(K, N), config(**vectors)),
        "numbers": tuner.layer(nn.Linear(K, N), config(config_A_B="constant", config_C="none")),
        "bias alone": tuner.layer(nn.Linear(K, N), config(config_A_B="none", config_D_E="vector")),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(r=3, config_D_E="none")),
    }
    for model in models.values():
        for name, p in model.named_parameters():
            if "glora" in name:
                torch.nn.init.normal_(p, std=0.3)
    return models


GLORA = register(
    Method(
        name="GLoRA",
        taxonomy="reparameterised",
        family="S",
        layer="peft.tuners.glora.layer.GloraLinear",
        adapters="glora_A",
        held=held,
        apply=apply,
        examples=examples,
        build=tuner.builder("GloraConfig"),
        rank=8,
        op="lora_linear",
        saves="x, and the folded weight",
        merges="W + W * A + B, b + b * D + E + W C",
        peft_type="GLORA",
        dense=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
