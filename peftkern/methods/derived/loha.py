"""LoHa (Hyeon-Woo et al. 2022, LyCORIS) on a linear layer, as HF PEFT computes it: the entrywise product of two low-rank ones.

    y = x W^T + s m * (x ((w1_a w1_b) * (w2_a w2_b))^T) + bias

Where R is small the product is not formed: it has rank R^2 at most, with factors whose rows and columns are products of pairs,

    A[i R + j] = w1_b[i] * w2_b[j],    B[:, i R + j] = w1_a[:, i] * w2_a[:, j]

Beyond, it is added to the weight, in one product with x where the library has a second one. Which form a layer has follows
from its sizes alone and not from a table of this CPU: it decides what is saved for backward and whether adapters in half
precision are taken, and that must not differ from one machine to the next.

In training m (N) drops rows of it by ``rank_dropout`` and divides by the mean of what is left, and a coin on the CPU, by
``module_dropout``, leaves an adapter out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...autograd.weight.hadamard import hadamard
from ...checks import check_parts, check_scaling
from .. import tuner
from ..exact import refuse_half
from ..linear import Branch, Linear, run
from ..look import Look
from ..registry import Held, Method, register

# R^2 (N + K) / (N K) up to which the product is a branch: that work, a row of x, to that of the frozen product.
_CROSSOVER = 0.6
_NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def _branch(tensors: tuple[Tensor, ...], scaling: float | Tensor = 1.0, rows: Tensor | None = None) -> Branch:
    w1_a, w1_b, w2_a, w2_b = tensors
    A = (w1_b[:, None] * w2_b).flatten(0, 1)
    B = (w1_a[:, :, None] * w2_a[:, None]).flatten(1)
    return Branch(A, B, scaling, g_d=rows)


def _is_thin(tensors: tuple[Tensor, ...]) -> bool:
    (N, R), (_, K), (_, S), _ = (t.shape for t in tensors)
    return R * S * (N + K) <= _CROSSOVER * N * K


def _with(y: Linear, tensors: tuple[Tensor, ...], scaling: float | Tensor = 1.0, rows: Tensor | None = None) -> Linear:
    # rows (N): scales of the product's rows.
    if _is_thin(tensors):
        return y.add(_branch(tensors, scaling, rows))
    change = hadamard(*tensors, scaling)
    return y.fold(change if rows is None else change * rows[:, None])


def loha_linear(
    x: Tensor, weight: Tensor, hada_w1_a: Tensor, hada_w1_b: Tensor, hada_w2_a: Tensor, hada_w2_b: Tensor, *,
    bias: Tensor | None = None, scaling: float | Tensor = 1.0,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with LoHa: the equation at the top of peftkern/methods/derived/loha.py, without dropout.

    Args:
        x: (..., K). weight: (N, K). hada_w1_a: (N, R). hada_w1_b: (R, K). hada_w2_a: (N, S). hada_w2_b: (S, K). bias,
            scaling: as in ``lora_linear``. A branch of rank R S.

    Returns (..., N). Raises as ``lora_linear`` does. Saved for backward beyond ranks that are small: x and the changed weight.
    """
    check_parts(
        weight, bias, hada_w1_a=(hada_w1_a, "N R"), hada_w1_b=(hada_w1_b, "R K"), hada_w2_a=(hada_w2_a, "N S"),
        hada_w2_b=(hada_w2_b, "S K"),
    )  # fmt: skip
    check_scaling(scaling, weight)
    return run(_with(Linear(weight, bias), (hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b), scaling), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``loha.Linear`` holds of an adapter."""
    rows, columns = (shape[0], None), (None, shape[1])
    tensors = tuple(tuner.tensors(look, name, dict(zip(_NAMES, (rows, columns) * 2))))
    if not _is_thin(tensors):
        refuse_half(name, *tensors)
    rank = tensors[0].shape[1] * tensors[2].shape[1]
    scaling = tuner.number(look.item("scaling", name), name)
    drops = (look.item("rank_dropout", name), look.item("module_dropout", name)) if look.value("training") else None
    return Held(name, LOHA, tensors, (scaling, drops), rank=rank)


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    scaling, drops = adapter.numbers
    if drops is None:
        return _with(y, adapter.tensors, scaling)
    rank_dropout, module_dropout = drops
    coin = torch.rand(1)  # whatever the probability, so that others get the numbers that they get from the library
    if module_dropout and not coin > module_dropout:
        return y
    rows = None
    if rank_dropout:
        like = adapter.tensors[0]
        rows = (torch.rand(like.shape[0]) > rank_dropout).to(like.dtype).to(like.device)
        rows /= rows.mean()
    return _with(y, adapter.tensors, scaling, rows)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(**options):
        return peft.LoHaConfig(**{"target_modules": ["0"], "r": 3, "alpha": 5, "init_weights": False, **options})

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config(r=2)),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config()),
        "high rank": tuner.layer(nn.Linear(K, N), config(r=5)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(r=2, alpha=1)),
    }


LOHA = register(
    Method(
        name="LoHa",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.loha.layer.Linear",
        adapters="hada_w1_a",
        held=held,
        apply=apply,
        function=loha_linear,
        examples=examples,
        build=tuner.builder("LoHaConfig"),
        rank=8,
        op="lora_linear",
        saves="x, (M, R^2) in fp32, and A and B; or x and the changed weight, in fp32",
        merges="W + s (w1_a w1_b) * (w2_a w2_b)",
        peft_type="LOHA",
        keeps_dtype=True,
        makes=True,
        dense=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
