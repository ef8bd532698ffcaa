"""BOFT (Liu et al. 2023) on a linear layer, as HF PEFT computes it: a product of block rotations between permutations.

    y = s * ((x R) W^T) + bias        R = R_m ... R_1,  R_i = P_i diag(C_i1, C_i2, ...) P_i^T

C_ig (b, b) is the Cayley transform of the skew-symmetric part of ``boft_R`` (m, G, b, b); P_i gathers the columns that a
factor mixes, which are 2^(i-1) b / 2 apart; ``boft_s`` (N, 1). Of several adapters the last one rotates x first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...bases.base import Base
from .. import tuner
from ..linear import Linear, Rotation, frozen_weight, run
from ..look import Look, NotCovered
from ..registry import Held, Method, loaded, register
from .oft import cayley


def butterfly(columns: int, blocks: int, size: int, factor: int, device: torch.device) -> Tensor:
    """int64 (K): the columns that factor number ``factor`` (0 the first) of ``blocks`` blocks of ``size`` takes together.

    Columns go in halves of a block; a block takes two of them that are 2^factor halves apart.
    """
    halves = torch.arange(columns, device=device).view(blocks >> factor, 2, -1, size // 2)
    return halves.transpose(1, 2).flatten()


def with_boft(y: Linear, boft_R: Tensor, boft_s: Tensor, dropout_p: float = 0.0) -> Linear:
    """The layer with one more adapter."""
    m, G, b, _ = boft_R.shape
    factors = boft_R.flatten(0, 1)
    R = cayley(0.5 * (factors - factors.transpose(1, 2))).view(boft_R.shape)
    if dropout_p > 0.0:
        R = _without_some(R, dropout_p)
    made = [Rotation(R[i], butterfly(G * b, G, b, i, R.device) if m > 1 else None) for i in reversed(range(m))]
    return y.scaled(boft_s.flatten())._replace(rotations=(*made, *y.rotations))


def _without_some(R: Tensor, p: float) -> Tensor:
    # As the library draws it: of one factor, this share of the blocks does nothing.
    m, G, b, _ = R.shape
    which = torch.randint(0, m, (1,))
    off = (torch.randperm(G) < int(p * G)).to(R.device)
    off = off & (torch.arange(m) == which).to(R.device)[:, None]
    return torch.where(off[..., None, None], torch.eye(b, device=R.device, dtype=R.dtype), R)


def boft_linear(
    x: Tensor, weight: Tensor | Base, boft_R: Tensor, boft_s: Tensor, *, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
    """A frozen linear layer with BOFT: the equation at the top of peftkern/methods/rotation/boft.py.

    Args:
        x: (..., K). weight: (N, K). boft_R: (m, G, b, b), G b = K, with b even and G a multiple of 2^(m-1) for m > 1.
            boft_s: (N) or (N, 1). Both in fp32 or x's dtype. bias: (N).

    Returns (..., N). Raises as ``lora_linear`` and ``block_rotate`` do. x is saved for backward, and what each factor but
    the last gives.
    """
    weight = frozen_weight(weight, bias, boft_R=(boft_R, "m G b b"), boft_s=(boft_s, "N 1|N"))
    m, G, b, _ = boft_R.shape
    if m < 1 or (m > 1 and (b % 2 or G % (1 << (m - 1)))):
        raise ValueError(f"boft_R has shape {tuple(boft_R.shape)}: {m} factors need an even b and G / 2^{m - 1} blocks")
    return run(with_boft(Linear(weight, bias), boft_R, boft_s), x)


def _dropout(look: Look, name: str) -> float:
    part = look.part("boft_dropout").part(name)
    if part is None:
        raise NotCovered(f"adapter {name!r} lacks a part")
    if type(part.module) is nn.Identity:
        part.require(nn.Identity, "boft_dropout")
        return 0.0
    part.require(loaded("peft.tuners.boft.layer.MultiplicativeDropoutLayer"), "boft_dropout")
    return part.value("p") if part.value("training") else 0.0


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``boft.Linear`` holds of an adapter."""
    R, s = tuner.tensors(look, name, {"boft_R": (None,) * 4, "boft_s": (shape[0], 1)})
    m, G, b, c = R.shape
    if G * b != shape[1] or b != c:
        raise NotCovered(f"boft_R of {name!r} has shape {tuple(R.shape)}")
    # The permutations are one buffer of the layer, which the adapter that was added last has made.
    P = look.tensor("boft_P")
    if type(P) not in tuner.PLAIN_TENSORS or P.shape != (m, shape[1], shape[1]):
        raise NotCovered(f"boft_P has not the shape that {name!r} needs")
    if m > 1:
        look.record.whole = False  # a kept plan would not see that P has other values
        if not all(torch.equal(P[i].argmax(0), butterfly(shape[1], G, b, i, P.device)) for i in range(m)):
            raise NotCovered(f"boft_P is not what {name!r} was made with")
    return Held(name, BOFT, (R, s), dropout_p=_dropout(look, name))


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return with_boft(y, *adapter.tensors, adapter.dropout_p)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(size: int = 4, **options):
        return peft.BOFTConfig(target_modules=["0"], boft_block_size=size, init_weights=False, **options)

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(2)),
        "number of blocks": tuner.layer(nn.Linear(K, N), config(0, boft_block_num=2)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(2)),
    }


BOFT = register(
    Method(
        name="BOFT",
        taxonomy="reparameterised",
        family="S",
        layer="peft.tuners.boft.layer.Linear",
        adapters="boft_R",
        held=held,
        apply=apply,
        function=boft_linear,
        examples=examples,
        build=tuner.builder("BOFTConfig", None, boft_block_size=4),
        rank=0,
        op="block_rotate",
        coefficients=("g_b",),
        saves="x, what each factor but the last gives, and x R W^T (M, N) for s",
        merges="s * W R^T",
        peft_type="BOFT",
        keeps_dtype=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
