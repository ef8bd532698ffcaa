"""Circular correlations of blocks of x, added to y in place.

    y[i, t] += s * sum over blocks j and places k of w[i, j, k - t mod b] x[j, k]

w (I, J, b): the row of x (J b) and that of y (I b) are cut into blocks of b, and between any two of them stands a circulant
matrix. They are products of real Fourier transforms, in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fft import irfft, rfft

from ...checks import check_number, check_tensor
from .added import added


class Circulant:
    """w (I, J, b), kept as its transform."""

    mirrors = False

    def __init__(self, w: Tensor):
        self.blocks, self.w = w.shape, rfft(w)
        self.width = w.shape[2] * max(w.shape[:2])

    def forward(self, x: Tensor) -> Tensor:
        """See ``Map``."""
        _, J, b = self.blocks
        spectrum = torch.einsum("njf,ijf->nif", rfft(x.reshape(-1, J, b)), self.w.conj())
        return irfft(spectrum, b).flatten(1)

    def backward(self, G: Tensor, x: Tensor | None, needs: tuple[bool, ...]) -> list[Tensor | None]:
        """See ``Map``."""
        I, J, b = self.blocks
        (need_x, need_w), G = needs, rfft(G.reshape(-1, I, b))
        given = G.conj() if self.mirrors else G
        dx = irfft(torch.einsum("nif,ijf->njf", given, self.w), b).flatten(1) if need_x else None
        dw = irfft(torch.einsum("nif,njf->ijf", G.conj(), rfft(x.reshape(-1, J, b))), b) if need_w else None
        return [dx, dw]


class Mirrored(Circulant):
    """The same, but the gradient of x is that of a y whose blocks run backwards: what HF PEFT 0.21 trains C3A with."""

    mirrors = True


def add_circulant(y: Tensor, x: Tensor, w: Tensor, scaling: float = 1.0, *, mirrored: bool = False) -> Tensor:
    """y (..., I b) with the correlations of x (..., J b) added, changed in place (see ``added``). w: (I, J, b).
    mirrored: whether x gets the gradient of ``Mirrored``.

    Raises ValueError, TypeError: naming what does not fit.
    """
    check_tensor("w", w)
    check_number("scaling", scaling)
    sizes = y.shape[-1], x.shape[-1]
    if w.dim() != 3 or (w.shape[0] * w.shape[2], w.shape[1] * w.shape[2]) != sizes or w.device != x.device:
        raise ValueError(f"w has shape {tuple(w.shape)} on {w.device}, expected (N / b, K / b, b) with N, K = {sizes}")
    return added(y, x, scaling, Mirrored if mirrored else Circulant, w)
