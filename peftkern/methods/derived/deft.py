"""DEFT and PaRa on a linear layer, as HF PEFT computes them: a few directions of the output are taken out, others put in.

    y = (I - Q P^T) x W^T + s Q (R drop(x)) + bias

P (N, R) is an orthonormal basis of ``deft_P``, and Q = P, or P is what is positive in ``deft_P``, which is Q. Without R
(R, K) it is PaRa. That is a branch with B = Q and A = s R - P^T W: a product of W with R rows, and one in backward.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...autograd.shapes import uncast
from ...autograd.weight.frozen_product import frozen_product
from ...checks import accumulate_dtype, check_parts
from ...ops.dropout_mask import acting
from .. import tuner
from ..linear import Branch, Linear, run
from ..look import Look, NotCovered
from ..registry import Held, Method, register

FEW = 8  # times fewer rows than columns, below which the product of W and R rows would be a large part of a call


def _directions(deft_P: Tensor, method: str) -> tuple[Tensor, Tensor]:
    # (Q, P), both (N, R).
    raw = deft_P.to(accumulate_dtype(deft_P.dtype))
    with uncast(raw):
        Q = torch.linalg.qr(raw)[0] if method == "qr" else raw
    return Q, Q if method == "qr" else raw.relu()


def _scaled(deft_R: Tensor, scaling: float) -> Tensor:
    R = deft_R.to(accumulate_dtype(deft_R.dtype))
    return R if scaling == 1.0 else R * scaling


def with_deft(
    y: Linear, deft_P: Tensor, deft_R: Tensor | None, method: str, scaling: float = 1.0, dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Linear:  # fmt: skip
    """The layer with one more adapter. method: qr or relu."""
    Q, P = _directions(deft_P, method)
    removed = frozen_product(P.t().contiguous(), y.weight.t())
    if deft_R is None:
        return y.add(Branch(-removed, Q))
    R = _scaled(deft_R, scaling)
    if dropout_p == 0.0:
        return y.add(Branch(R - removed, Q))
    return y.add(Branch(-removed, Q)).add(Branch(R, Q, 1.0, dropout_p, seed=seed))


def deft_linear(
    x: Tensor, weight: Tensor, deft_P: Tensor, deft_R: Tensor, *, bias: Tensor | None = None, method: str = "qr",
    dropout_p: float = 0.0, training: bool = False, seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with DEFT: the equation at the top of peftkern/methods/derived/deft.py, without a scaling.

    Args:
        x: (..., K). weight: (N, K). deft_P: (N, R). deft_R: (R, K). method: qr (R at most N) or relu. bias, dropout_p,
            training, seed: as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    check_parts(weight, bias, deft_P=(deft_P, "N R"), **({} if deft_R is None else {"deft_R": (deft_R, "R K")}))
    if method not in ("qr", "relu"):
        raise ValueError(f"method is {method!r}, expected 'qr' or 'relu'")
    return run(with_deft(Linear(weight, bias), deft_P, deft_R, method, 1.0, acting(dropout_p, training), seed), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``deft.DeftLinear`` holds of an adapter."""
    removes = look.item("deft_para", name)
    shapes = {"deft_P": (shape[0], None), **({} if removes else {"deft_R": (None, shape[1])})}
    P, *R = tuner.tensors(look, name, shapes)
    if P.dtype == torch.float64:
        raise NotCovered(f"{name!r} is in fp64, and the library computes in fp32")
    scaling = tuner.number(look.item("deft_scaling", name), name)
    p = tuner.drop_probability(look, "deft_dropout", name)
    numbers = look.item("deft_decomposition", name), scaling
    return Held(name, DEFT, (P, *R), numbers, 0.0 if removes else p, P.shape[1])


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    P, R = (*adapter.tensors, None)[:2]
    return with_deft(y, P, R, *adapter.numbers, adapter.dropout_p)


def alone(weight: Tensor, bias: Tensor | None, adapter: Held, x: Tensor) -> Tensor:
    """y of a layer with this adapter alone. Of few rows it takes the directions out of the base's output: W is read once."""
    if FEW * x.shape[:-1].numel() > x.shape[-1] or adapter.dropout_p > 0.0:
        return run(apply(Linear(weight, bias), adapter), x).to(x.dtype)
    P, R = (*adapter.tensors, None)[:2]
    method, scaling = adapter.numbers
    Q, P = _directions(P, method)
    h = run(Linear(weight), x).to(Q.dtype)
    u = -(h @ P) if R is None else F.linear(x.to(Q.dtype), _scaled(R, scaling)) - h @ P
    y = h + F.linear(u, Q, bias if bias is None else bias.to(Q.dtype))
    return y.to(x.dtype)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft
    from transformers.pytorch_utils import Conv1D

    def config(**options):
        return peft.DeftConfig(**{"target_modules": ["0"], "r": 4, "init_weights": False, **options})

    K, N = in_features, out_features
    return {
        "relu": tuner.layer(nn.Linear(K, N), config(decomposition_method="relu")),
        "qr, no bias": tuner.layer(nn.Linear(K, N, bias=False), config(decomposition_method="qr", alpha=6)),
        "PaRa": tuner.layer(nn.Linear(K, N), config(para=True)),
        "as PEFT starts": tuner.layer(nn.Linear(K, N), config(init_weights=True)),
        "Conv1D": tuner.layer(Conv1D(N, K), config(fan_in_fan_out=True)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(r=3, decomposition_method="qr")),
    }


DEFT = register(
    Method(
        name="DEFT",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.deft.layer.DeftLinear",
        adapters="deft_P",
        held=held,
        apply=apply,
        alone=alone,
        function=deft_linear,
        examples=examples,
        build=tuner.builder("DeftConfig"),
        op="lora_linear",
        saves="x, (M, R) in fp32, and A and Q",
        merges="W + Q (s R - P^T W)",
        peft_type="DEFT",
        keeps_dtype=True,
        loses_small=True,
        makes=True,
        dense=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
