"""PSOFT on a linear layer, as HF PEFT computes it: a small matrix, orthogonal but for scales, turns a subspace of W.

    y = x W^T + s B ((Q - I) (A drop(x))) + bias,    Q = diag(b) (I + S) (I - S)^-1 diag(a)

A (R, K) and B (N, R), leading singular vectors of W, are frozen. S (R, R) is skew-symmetric, R (R - 1) / 2 numbers that
train, as a and b (R) do, unless they are missing. The inverse may be a series that ends, of an S shrunk to a norm, and any
matrix may stand for the orthogonal one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...autograd.shapes import uncast
from ...bases.base import Base
from ...checks import accumulate_dtype
from ...ops.dropout_mask import acting
from .. import tuner
from ..linear import Branch, Linear, frozen_weight, run
from ..look import Look, NotCovered
from ..registry import Held, Method, register


def cayley(S: Tensor, terms: int | None = None, eps: float | None = None) -> Tensor:
    """The orthogonal matrix of a skew-symmetric S (R, R), or the first terms of its series in S, which shrinks to the
    Frobenius norm eps."""
    one = torch.eye(S.shape[0], dtype=S.dtype, device=S.device)
    if terms is None:
        return torch.linalg.solve(one - S, one + S, left=False)
    if eps is not None:
        norm = torch.linalg.norm(S)
        S = S * torch.where(norm.isfinite() & (norm > eps), eps / (norm + 1e-12), 1.0)
    # I + 2 S + 2 S^2 + ... + S^n, where n is 3 at least but for series of one or two terms.
    factors = [2.0] * (terms - 1) if terms < 3 else [2.0] * max(terms - 2, 2) + [1.0]
    Q, power = one, one
    for factor in factors:
        power = power @ S
        Q = Q + factor * power
    return Q


def _branch(A: Tensor, B: Tensor, Q: Tensor, *options) -> Branch:
    with uncast(B):
        return Branch(A, torch.addmm(B, B, Q.to(B.dtype), beta=-1), *options)


def psoft_linear(
    x: Tensor, weight: Tensor | Base, psoft_A: Tensor, psoft_B: Tensor, psoft_R: Tensor, *, bias: Tensor | None = None,
    scaling: float | Tensor = 1.0, dropout_p: float = 0.0, training: bool = False, seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with PSOFT: the equation at the top of peftkern/methods/derived/psoft.py.

    Args:
        x: (..., K). weight: (N, K). psoft_A: (R, K). psoft_B: (N, R). psoft_R: Q (R, R). bias, scaling, dropout_p,
            training, seed: as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does. x is not saved for backward unless psoft_A requires grad.
    """
    weight = frozen_weight(weight, bias, psoft_A=(psoft_A, "R K"), psoft_B=(psoft_B, "N R"), psoft_R=(psoft_R, "R R"))
    branch = _branch(psoft_A, psoft_B, psoft_R, scaling, acting(dropout_p, training))._replace(seed=seed)
    return run(Linear(weight, bias).add(branch), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``psoft.Linear`` holds of an adapter, and the ways of its matrix."""
    A, B = tuner.tensors(look, name, {"_psoft_A_cache": (None, shape[1]), "_psoft_B_cache": (shape[0], None)})
    part = look.part("psoft_R").part(name)
    q, b, a = (part.tensor(key) for key in ("weight", "vector_b", "vector_a"))
    if any(not tuner.plain_or_none(t) or (t is not None and t.dtype != A.dtype) for t in (q, b, a)):
        raise NotCovered(f"the tensors of {name!r} differ in dtype, or are not plain")
    above, series = (), ()
    if part.value("orth"):
        above = part.tensor("rows"), part.tensor("cols")
        if part.value("use_cayley_neumann"):
            series = part.value("num_cayley_neumann_terms"), part.value("cayley_neumann_eps")
    numbers = tuner.number(look.item("scaling", name), name), series
    p = tuner.drop_probability(look, "psoft_dropout", name)
    return Held(name, PSOFT, (A, B, q, b, a, *above), numbers, p, A.shape[0])


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    (A, B, Q, b, a, *above), (scaling, series) = adapter.tensors, adapter.numbers
    if above:
        wide = Q.to(accumulate_dtype(Q.dtype))
        upper = wide.new_zeros(A.shape[0], A.shape[0]).index_put(tuple(above), wide)
        with uncast(wide):
            Q = cayley(upper - upper.t(), *series)
    Q = Q if b is None else b[:, None] * Q
    return y.add(_branch(A, B, Q if a is None else Q * a, scaling, adapter.dropout_p))


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(**options):
        return peft.PsoftConfig(**{"target_modules": ["0"], "r": 4, "psoft_alpha": 6, "init_weights": False, **options})

    K, N = in_features, out_features
    series = {"use_cayley_neumann": True}
    return {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias, no magnitudes": tuner.layer(
            nn.Linear(K, N, bias=False), config(r=5, psoft_mag_a=False, psoft_mag_b=False, ab_svd_init="pissa_init")
        ),
        "any matrix": tuner.layer(nn.Linear(K, N), config(psoft_orth=False)),
        **{f"{n} terms": tuner.layer(nn.Linear(K, N), config(num_cayley_neumann_terms=n, **series)) for n in (2, 3, 5)},
        "a bounded series": tuner.layer(nn.Linear(K, N), config(cayley_neumann_eps=0.3, **series)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(r=3, psoft_alpha=2)),
    }


PSOFT = register(
    Method(
        name="PSOFT",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.psoft.layer.Linear",
        adapters="psoft_R",
        held=held,
        apply=apply,
        function=psoft_linear,
        examples=examples,
        build=tuner.builder("PsoftConfig"),
        op="lora_linear",
        saves="(M, R) in fp32",
        merges="W + s B (Q - I) A",
        peft_type="PSOFT",
        makes=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
