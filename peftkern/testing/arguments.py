"""Arguments of ops, of which a call rarely needs all: what is left out is its neutral value."""

from __future__ import annotations

from torch import Tensor

from ..bases.base import Base, base_of
from ..equation import Needs, Scales
from ..ops.lora_linear import Backward, Forward
from ..ops.multi_lora_linear import NO_BASE


def _filled(options: dict) -> dict:
    scales = [options.pop(symbol, None) for symbol in Scales._fields]
    return dict(scaling=1.0, dropout_p=0.0, seed=None, scales=scales) | options


def forward(x: Tensor, weight: Tensor | Base, lora_A: Tensor, lora_B: Tensor, **options) -> Forward:
    """``options``: other fields of Forward, and vectors by the symbol of their place."""
    given, options = base_of(weight), dict(bias=None, save_base=False) | options
    return Forward(x, list(given.tensors), given.kind, lora_A, lora_B, **_filled(options))


def backward(
    dy: Tensor, x: Tensor | None, u: Tensor, h: Tensor | None, weight: Tensor | Base, lora_A: Tensor, lora_B: Tensor,
    **options,
) -> Backward:  # fmt: skip
    """``options``: as in ``forward``, and ``needs``: names of equation.Needs, by default those of x, A and B."""
    given, names = base_of(weight), options.pop("needs", ("x", "A", "B"))
    need = [name in names for name in Needs._fields]
    return Backward(dy, x, u, h, list(given.tensors), given.kind, lora_A, lora_B, needs=need, **_filled(options))


def base(weight: Tensor | None) -> tuple[list[Tensor], str]:
    """``base`` and ``kind`` of multi_lora_linear's ops: of a weight (N, K), or of the branch alone."""
    return ([], NO_BASE) if weight is None else ([weight], "dense")
