"""Arguments of ops, of which a call rarely needs all: what is left out is its neutral value."""

from __future__ import annotations

from collections.abc import Iterable

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
    needs: Iterable[str] = ("x", "A", "B"), **options,
) -> Backward:  # fmt: skip
    """``needs``: names of equation.Needs; ``options``: as in ``forward``."""
    given, need = base_of(weight), [name in needs for name in Needs._fields]
    return Backward(dy, x, u, h, list(given.tensors), given.kind, lora_A, lora_B, needs=need, **_filled(options))


def base(weight: Tensor | None) -> tuple[list[Tensor], str]:
    """``base`` and ``kind`` of multi_lora_linear's ops: of a weight (N, K), or of the branch alone."""
    return ([], NO_BASE) if weight is None else ([weight], "dense")
