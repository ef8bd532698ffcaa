"""FRoD (2025) on a linear layer, as HF PEFT computes it: the weight as a product, of which the middle trains.

    y = x (U (diag(l) + S) V^T)^T + bias,    W = U diag(l) V^T at first

U (N, K) and V (K, K) are frozen, and V is shared by layers of a kind. l (K) trains, and S (K, K), which has n numbers outside of
its diagonal. S is multiplied as a dense matrix: one percent of its entries cost a sparse product more than all cost a dense one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...autograd.shapes import cast
from ...autograd.weight.folded_linear import folded_linear
from .. import tuner
from ..exact import made_of, product, wide
from ..linear import Linear
from ..look import Look, NotCovered
from ..registry import Held, Method, register

# With fewer than one entry of S in so many the library's sparse product may be faster.
DENSE = 200


def _places(indices: Tensor, K: int) -> tuple[Tensor, ...]:
    diagonal = torch.arange(K, device=indices.device).expand(2, K)
    return torch.cat([diagonal, indices], 1).unbind()


def _middle(diagonal: Tensor, values: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    K, numbers = diagonal.numel(), cast(torch.cat([diagonal, values]), dtype)
    return numbers.new_zeros((K, K)).index_put(made_of(indices, _places, K), numbers, accumulate=True)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``frod.Linear`` holds of an adapter, and what its model holds for it."""
    N, K = shape
    diagonal, values = tuner.tensors(look, name, {"frod_lambda_l": (K,), "frod_lambda_s_values": (None,)})
    if tuner.drop_probability(look, "frod_dropout", name):
        raise NotCovered("FRoD with dropout multiplies by the weight too")
    if look.item("runtime_offload_base_weight", name):
        raise NotCovered(f"the base weight of {name!r} stays on the CPU")
    if values.numel() * DENSE < K * K:
        raise NotCovered(f"the middle of {name!r} is very sparse")
    U, V = look.part("frod_U").tensor(name), look.linked("frod_V").tensor(name)
    indices = look.linked("frod_s_indices").tensor(name)
    found = [None if t is None else tuple(t.shape) for t in (U, V, indices)]
    if found != [(N, K), (K, K), (2, values.numel())]:
        raise NotCovered(f"the projections of {name!r} have shapes {found}")
    return Held(name, FROD, (diagonal, values, U, V, indices), rank=K)


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter: the definition. ``alone`` makes no whole weight."""
    diagonal, values, U, V, indices = adapter.tensors
    return y.fold(product(product(U, _middle(diagonal, values, indices, wide(values).dtype)), V.t()) - y.weight)


def alone(weight: Tensor, bias: Tensor | None, adapter: Held, x: Tensor) -> Tensor:
    """y of a layer with this adapter alone: by its three matrices, in x's dtype or autocast's."""
    diagonal, values, U, V, indices = adapter.tensors
    z = folded_linear(x, cast(V, x.dtype).t())
    z = folded_linear(z, _middle(diagonal, values, indices, z.dtype))
    return cast(folded_linear(z, cast(U, z.dtype), bias), x.dtype)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft
    from transformers.pytorch_utils import Conv1D

    def config(**options):
        settings = {"target_modules": ["0"], "sparse_rate": 0.1, "init_weights": False, "progressbar": False, **options}
        return peft.FrodConfig(**settings)

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(sparse_rate=0.5)),
        "Conv1D": tuner.layer(Conv1D(N, K), config(fan_in_fan_out=True)),
    }


FROD = register(
    Method(
        name="FRoD",
        taxonomy="reparameterised",
        family="S",
        layer="peft.tuners.frod.layer.Linear",
        adapters="frod_lambda_l",
        held=held,
        apply=apply,
        alone=alone,
        examples=examples,
        build=tuner.builder("FrodConfig", None, progressbar=False),
        rank=0,
        op="lora_linear",
        one_active=True,
        saves="x V, and the middle (K, K)",
        merges="U (diag(l) + S) V^T",
        peft_type="FROD",
        keeps_dtype=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
