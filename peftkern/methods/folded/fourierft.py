"""FourierFT (Gao et al. 2024) on a linear layer, as HF PEFT computes it: some frequencies of the change of the weight train.

    y = x (W + s D)^T + bias,    D = the real part of the inverse 2D Fourier transform of c (n) at indices (2, n), else 0

The real part of a transform is that of the spectrum's Hermitian half, so one real transform makes the change, in a quarter of the
memory, and the library's second product is folded into the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_parts, check_scaling
from .. import tuner
from ..exact import made_of, places, refuse_half, wide
from ..linear import Linear, run
from ..look import Look
from ..registry import Held, Method, register
from . import models


def _half(indices: Tensor, N: int, K: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    # Each entry stands, halved, at (u, v) and at (-u, -v). Of these columns those up to K / 2 are stored; the others come to
    # nothing, in the first.
    u, v = indices
    rows, columns = torch.stack([u, -u % N]), torch.stack([v, -v % K])
    stored = columns <= K // 2
    return (rows, torch.where(stored, columns, 0)), stored / 2


def _with(y: Linear, spectrum: Tensor, indices: Tensor, scaling: float | Tensor) -> Linear:
    (N, K), c = y.weight.shape, wide(spectrum)
    at, halves = made_of(indices, _half, N, K)
    half = c.new_zeros((N, K // 2 + 1)).index_put(at, c * scaling * halves, accumulate=True)
    return y.fold(torch.fft.irfft2(half, s=(N, K)))


def fourierft_linear(
    x: Tensor, weight: Tensor, spectrum: Tensor, indices: Tensor, *, bias: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    """A frozen linear layer with FourierFT: the equation at the top of peftkern/methods/folded/fourierft.py.

    Args:
        x: (..., K). weight: (N, K). spectrum: c (n). indices: (2, n), int64, rows below N and columns below K, what names an
            entry twice adds up. bias: (N). scaling: s. dtypes as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does. Saved for backward: x and the folded weight, in fp32.
    """
    check_parts(weight, bias, spectrum=(spectrum, "n"), indices=(indices, "2 n", tuple(weight.shape)))
    check_scaling(scaling, weight)
    return run(_with(Linear(weight, bias), spectrum, indices, scaling), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``fourierft.FourierFTLinear`` holds of an adapter."""
    (spectrum,) = tuner.tensors(look, name, {"fourierft_spectrum": (None,)})
    refuse_half(name, spectrum)
    scaling = tuner.number(look.item("fourierft_scaling", name), name)
    return Held(name, FOURIERFT, (spectrum, places(look, "indices", name, spectrum)), (scaling,))


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return _with(y, *adapter.tensors, *adapter.numbers)


FOURIERFT = register(
    Method(
        name="FourierFT",
        taxonomy="reparameterised",
        family="S",
        layer="peft.tuners.fourierft.layer.FourierFTLinear",
        adapters="fourierft_spectrum",
        held=held,
        apply=apply,
        function=fourierft_linear,
        examples=models.examples("FourierFTConfig", {"scaling": 20.0}),
        build=models.builder("FourierFTConfig", 1000),
        rank=0,
        op="lora_linear",
        saves="x, and the folded weight in fp32",
        merges="W + s D",
        peft_type="FOURIERFT",
        keeps_dtype=True,
        dense=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
