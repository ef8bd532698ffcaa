"""OFT (Qiu et al. 2023, Liu et al. 2023) on a linear layer, as HF PEFT computes it: blocks of the input are rotated.

    y = (x R) W^T + bias        R block diagonal, R_g = 2 (I + Q_g + Q_g^2 + ...) - I, of a skew-symmetric Q_g (b, b)

The series is cut off as the library does it, five terms: I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4, or exact: (I + Q)^-1 (I - Q),
whose sign of Q is the other one. ``oft_R`` (G, b (b - 1) / 2) has the upper triangles. The library's module dropout
acts nowhere in its forward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...autograd.neumann import neumann, skew
from ...bases.base import Base
from ...checks import accumulate_dtype, check_whole
from .. import tuner
from ..linear import Linear, Rotation, frozen_weight, run
from ..look import Look, NotCovered
from ..registry import Held, Method, loaded, register

# Of a series that converges more would change no bit, and coefficients are a number each.
_MOST_TERMS = 1000


def cayley(Q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1 of each Q (G, b, b), in fp32 (fp64 for fp64)."""
    eye = torch.eye(Q.shape[-1], device=Q.device, dtype=accumulate_dtype(Q.dtype))
    return torch.linalg.solve(eye + Q, eye - Q, left=False)


def _series(terms: int) -> tuple[float, ...]:
    # Of the transform of -Q as the library cuts it off: the last power, terms - 1 and at least 3, counts once.
    return (1.0, 2.0)[: max(terms, 1)] if terms < 3 else (1.0, *[2.0] * max(terms - 2, 2), 1.0)


def _rotation(upper: Tensor, rows: Tensor, cols: Tensor, size: int, terms: int | None) -> Rotation:
    if terms is None:
        return Rotation(cayley(skew(upper, rows, cols, size)))
    return Rotation(neumann(upper, rows, cols, size, _series(terms)))


def oft_linear(
    x: Tensor, weight: Tensor | Base, oft_R: Tensor, *, bias: Tensor | None = None, terms: int | None = 5
) -> Tensor:
    """A frozen linear layer with OFT: the equation at the top of peftkern/methods/rotation/oft.py.

    Args:
        x: (..., K). weight: (N, K). oft_R: (G, b (b - 1) / 2), G = K / b, or 1 to share the matrix; in fp32 or x's dtype.
        bias: (N). terms: of the series, 1 to 1000, or None for the exact transform.

    Returns (..., N). Raises as ``lora_linear`` and ``block_rotate`` do. x is saved for backward if oft_R trains.
    """
    weight = frozen_weight(weight, bias, oft_R=(oft_R, "G elements"))
    if terms is not None:
        check_whole("terms", terms, 1, _MOST_TERMS)
    elements = oft_R.shape[-1]
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    blocks, rest = divmod(weight.shape[1], size)
    if size * (size - 1) != 2 * elements or rest or len(oft_R) not in (1, blocks):
        raise ValueError(f"oft_R has shape {tuple(oft_R.shape)}, expected (G, b (b - 1) / 2) with G b = K, or G = 1")
    rows, cols = torch.triu_indices(size, size, 1, device=oft_R.device)
    return run(Linear(weight, bias, rotations=(_rotation(oft_R, rows, cols, size, terms),)), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``oft.Linear`` holds of an adapter."""
    part = look.part("oft_R").part(name)
    if part is None:
        raise NotCovered(f"adapter {name!r} lacks a part")
    part.require(loaded("peft.tuners.oft.layer.OFTRotationModule"), "oft_R")
    size, coft, eps, neumann_series, terms = map(
        part.value, ("block_size", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms")
    )
    upper, rows, cols = map(part.tensor, ("weight", "rows", "cols"))
    if not all(type(t) in tuner.PLAIN_TENSORS for t in (upper, rows, cols)):
        raise NotCovered(f"oft_R of {name!r} is no plain tensor")
    blocks = 1 if part.value("block_share") else shape[1] // size
    if upper.shape != (blocks, size * (size - 1) // 2):
        raise NotCovered(f"oft_R of {name!r} has shape {tuple(upper.shape)}")
    return Held(name, OFT, (upper, rows, cols), (size, terms if neumann_series else None, eps if coft else None))


@torch.no_grad()
def _project(upper: Tensor, rows: Tensor, cols: Tensor, size: int, eps: float) -> None:
    # Q to a norm of at most eps / sqrt(G): in place and with the bits of the library, since a parameter is changed.
    limit = eps / torch.sqrt(torch.tensor(upper.shape[0]))
    norm = torch.linalg.vector_norm(skew(upper, rows, cols, size), dim=(1, 2))[:, None]
    upper.copy_(torch.where(norm <= limit, upper, limit * (upper / norm)))


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    size, terms, eps = adapter.numbers
    if eps is not None:
        _project(*adapter.tensors, size, eps)
    return y._replace(rotations=(*y.rotations, _rotation(*adapter.tensors, size, terms)))


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(**options):
        sizes = {"oft_block_size": 0} if "r" in options else {"oft_block_size": 4}
        return peft.OFTConfig(target_modules=["0"], init_weights=False, **sizes, **options)

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(r=6)),
        "exact": tuner.layer(nn.Linear(K, N), config(use_cayley_neumann=False)),
        "two terms": tuner.layer(nn.Linear(K, N), config(num_cayley_neumann_terms=2)),
        "four terms": tuner.layer(nn.Linear(K, N), config(num_cayley_neumann_terms=4)),
        "seven terms": tuner.layer(nn.Linear(K, N), config(num_cayley_neumann_terms=7)),
        "shared block": tuner.layer(nn.Linear(K, N), config(block_share=True)),
        "constrained": tuner.layer(nn.Linear(K, N), config(coft=True, eps=0.3)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(use_cayley_neumann=False), config(r=12)),
    }


OFT = register(
    Method(
        name="OFT",
        taxonomy="reparameterised",
        family="S",
        layer="peft.tuners.oft.layer.Linear",
        adapters="oft_R",
        held=held,
        apply=apply,
        function=oft_linear,
        examples=examples,
        build=tuner.builder("OFTConfig", None, oft_block_size=32),
        rank=0,
        op="block_rotate",
        saves="x",
        merges="W R^T",
        peft_type="OFT",
        keeps_dtype=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
