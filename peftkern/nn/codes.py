"""A base as a layer: what holds it in the place of a library's quantised one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..bases.base import Base, kind_of
from ..methods import quantised
from ..methods.look import NotCovered
from ..methods.quantised import Frozen


class Codes(nn.Module):
    """A base as a module: its tensors are buffers, which move from device to device and keep their dtypes.

    Args:
        base: with its shape (N, K). Its tensors are shared. Raises TypeError or ValueError for one that does not fit its kind.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        if base.shape is None:
            raise ValueError(f"the base of kind {base.kind} has no shape, which a layer needs")
        (self.out_features, self.in_features), self.kind = base.shape, base.kind
        kind_of(base.kind).check(base.tensors, torch.empty(0, device=base.device), self.in_features, self.out_features)
        for i, t in enumerate(base.tensors):
            self.register_buffer(f"weight_{i}" if i else "weight", t)
        self.bias = None

    @property
    def base(self) -> Base:
        """The base as it is now."""
        return Base(self.kind, tuple(self._buffers.values()), (self.out_features, self.in_features))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codes:
        for name, t in self._buffers.items():
            moved = fn(t)
            self._buffers[name] = moved if moved.dtype == t.dtype else t.to(moved.device)
        return self


def frozen(layer: nn.Module) -> Frozen:
    """Weight and bias of a quantised layer, or of ``Codes``, as they are now.

    Raises RuntimeError for a layer that has become what cannot be read.
    """
    if isinstance(layer, Codes):
        return Frozen(layer.base, None)
    try:
        return quantised.now(layer) or Frozen(layer.weight, layer.bias)
    except NotCovered as refused:
        raise RuntimeError(f"the quantised layer cannot be read: {refused}") from None
