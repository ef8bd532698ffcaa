"""An invertible adapter behind the embeddings (Pfeiffer et al. 2020, MAD-X), by NICE's coupling.

y1 = x1 + F(x2)     y2 = x2 + G(y1)          x2 = y2 - G(y1)     x1 = y1 - F(x2)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..bottleneck import BottleneckAdapter

Beside = Callable[[Tensor, Tensor], Tensor]


def coupled(x: Tensor, split: int, F: Beside, G: Beside, inverse: bool = False) -> Tensor:
    """The coupling of x (..., hidden), whose first half has ``split`` columns.

    ``F``, ``G``: (what a subnetwork reads, what its output is added to) -> the sum.
    """
    first, second = x.tensor_split([split], -1)
    if inverse:
        second = -G(first, -second)
        first = -F(second, -first)
    else:
        first = F(second, first)
        second = G(first, second)
    return torch.cat([first, second], -1)


class Invertible(nn.Module):
    """The coupling of the two halves of x (..., hidden), F and G bottlenecks beside a residual of the other half.

    Args:
        hidden: columns; of an odd number the second half has one more.
        reduction: F and G have a width of their input's over this. activation: as in ``bottleneck_adapter``.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden: int,
        reduction: int = 2,
        activation: str = "relu",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden < 2 or not 1 <= reduction <= hidden // 2:
            raise ValueError(f"reduction is {reduction}, expected 1 to half of hidden = {hidden}")
        first, second = hidden // 2, hidden - hidden // 2
        options = {"device": device, "dtype": dtype}
        self.hidden = hidden
        self.F = BottleneckAdapter(second, second // reduction, activation, out=first, **options)
        self.G = BottleneckAdapter(first, first // reduction, activation, out=second, **options)

    def forward(self, x: Tensor, inverse: bool = False) -> Tensor:
        """(..., hidden) -> (..., hidden). ``inverse``: what gives x, to a rounding of each sum."""
        return coupled(x, self.hidden // 2, self.F, self.G, inverse)
