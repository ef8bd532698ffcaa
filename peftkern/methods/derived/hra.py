"""HRA (Yuan et al. 2024) on a linear layer, as HF PEFT computes it: the weight times R Householder reflections.

    y = x (W H)^T + bias,    H = (I - 2 v_1 v_1^T) ... (I - 2 v_R v_R^T),    v_i = u_i / |u_i|

Neither H nor W H is formed. With V (K, R) the columns v_i, reflections are a change of rank R in the compact WY form:

    H = I - V T V^T,    T^-1 = I / 2 + the part of V^T V above its diagonal

so A = V^T and B = -W V T: a product of W with R columns, and one in backward. With ``apply_GS`` the columns are made
orthonormal first (modified Gram-Schmidt), and T = 2 I. Several adapters reflect in turn.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...autograd.shapes import uncast
from ...autograd.weight.frozen_product import frozen_product
from ...checks import accumulate_dtype, check_parts
from .. import tuner
from ..linear import Branch, Linear, run
from ..look import Look
from ..registry import Held, Method, register


def _orthonormal(u: Tensor) -> Tensor:
    # In the library's own order of products, since rounding decides where columns are equal, as those of a fresh adapter.
    columns: list[Tensor] = []
    for column in u.split(1, 1):
        for other in columns:
            column = column - (other.t() @ column) * other
        columns.append(column / column.norm())
    return torch.cat(columns, 1)


def with_hra(y: Linear, hra_u: Tensor, apply_GS: bool) -> Linear:
    """The layer with the reflections of hra_u (K, R). Its branches are reflections too."""
    u = hra_u.to(accumulate_dtype(hra_u.dtype))
    with uncast(u):
        A = (_orthonormal(u) if apply_GS else u / u.norm(dim=0)).t().contiguous()
        product = frozen_product(A, y.weight)
        for b in y.branches:
            product = product + (A @ b.lora_A.t()) @ b.lora_B.t()
        if apply_GS:
            B = -2.0 * product
        else:
            half = torch.eye(A.shape[0], dtype=A.dtype, device=A.device) / 2
            B = torch.linalg.solve_triangular((A @ A.t()).tril(-1) + half, -product, upper=False)
    return y.add(Branch(A, B.t()))


def hra_linear(
    x: Tensor, weight: Tensor, hra_u: Tensor, *, bias: Tensor | None = None, apply_GS: bool = False
) -> Tensor:
    """A frozen linear layer with HRA: the equation at the top of peftkern/methods/derived/hra.py.

    Args:
        x: (..., K). weight: (N, K). hra_u: (K, R), no column zero. bias: (N). apply_GS: whether its columns are made
            orthonormal.

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    check_parts(weight, bias, hra_u=(hra_u, "K R"))
    return run(with_hra(Linear(weight, bias), hra_u, apply_GS), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``hra.HRALinear`` holds of an adapter."""
    (u,) = tuner.tensors(look, name, {"hra_u": (shape[1], None)})
    return Held(name, HRA, (u,), (look.item("hra_apply_GS", name),), rank=u.shape[1])


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return with_hra(y, *adapter.tensors, *adapter.numbers)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(**options):
        return peft.HRAConfig(**{"target_modules": ["0"], "r": 4, "init_weights": False, **options})

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias, odd rank": tuner.layer(nn.Linear(K, N, bias=False), config(r=5)),
        "as PEFT starts": tuner.layer(nn.Linear(K, N), config(init_weights=True)),
        "apply_GS": tuner.layer(nn.Linear(K, N), config(apply_GS=True)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(r=3, apply_GS=True)),
    }


HRA = register(
    Method(
        name="HRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.hra.layer.HRALinear",
        adapters="hra_u",
        held=held,
        apply=apply,
        function=hra_linear,
        examples=examples,
        build=tuner.builder("HRAConfig"),
        rank=8,
        op="lora_linear",
        saves="x, (M, R) in fp32, and A, B and W V",
        merges="W H",
        peft_type="HRA",
        keeps_dtype=True,
        makes=True,
        dense=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
