"""A module for the residual stream, and this package's computation on its very parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Example(NamedTuple):
    """One form of a method.

    Attributes:
        library: that has the module. make: (H, R, dtype) -> the module, with random parameters in this dtype, as far as the
            library takes it. plain: the same in torch's own steps, without the library.
        stock: (module, h, residual) -> y (B, T, H), by the module and what the library does around it.
        ours: the same by this package; ``seed`` of dropout.
        residual: whether y is added to something else than h.
    """

    library: str
    make: Callable[[int, int, torch.dtype], nn.Module]
    plain: Callable[[int, int, torch.dtype], nn.Module]
    stock: Callable[[nn.Module, Tensor, Tensor], Tensor]
    ours: Callable[..., Tensor]
    residual: bool = False


def randomised(module: nn.Module, std: float = 0.3) -> nn.Module:
    """The module with random parameters of this deviation: many start as zeros, which hide work and errors. The diagonal of
    an orthogonal parametrisation is signs, and stays."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            signs = p.diagonal().clone() if name.endswith("parametrizations.weight.original") else None
            p.normal_(std=std)
            if signs is not None:
                p.diagonal().copy_(signs)
    return module
