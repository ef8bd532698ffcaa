"""WaveFT (Bilican et al. 2025) on a linear layer, as HF PEFT computes it: some wavelet coefficients of the weight's change train.

    y = x (W + s D)^T + bias,    D = one inverse 2D wavelet transform of c (n) at indices (2, n), else 0; or c itself there

The transform is that of the columns, then that of the rows (wavelet.py). Its input is padded to even sizes by what the transform
cuts off, half of it in front. The library filters the rows of its upper right quarter and the columns of its lower left one as
high frequencies, which is the other way round than usual.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import tuner
from ..linear import Linear, run
from ..look import Look, NotCovered
from ..registry import Held, Method, register
from .change import refuse_half, wide
from .wavelet import synthesis


def _padded(size: int, L: int) -> tuple[int, int]:
    # Of a side of the matrix: coefficients, and how many of them stand in front of it.
    P = size + L - 2
    P += P % 2
    return P, (P - size) // 2


def _change(spectrum: Tensor, indices: Tensor, filters: Tensor | None, shape: tuple[int, int]) -> Tensor:
    (N, K), (rows, columns), values = shape, indices, wide(spectrum)
    if filters is None:
        return values.new_zeros(shape).index_put((rows, columns), values)
    taps = filters.to(values)
    (P, top), (Q, left) = (_padded(size, taps.shape[1]) for size in shape)
    (below, i), (right, j) = _halves(rows + top, P), _halves(columns + left, Q)
    at = i + right * (P // 2), j + below * (Q // 2)
    wide_rows = synthesis(values.new_zeros((P, Q)).index_put(at, values), taps)[:, :K]
    return synthesis(wide_rows.t().contiguous(), taps)[:, :N].t()


def _halves(positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    # Whether in the second half, and where in its half.
    return positions // (size // 2), positions % (size // 2)


def _with(y: Linear, spectrum: Tensor, indices: Tensor, filters: Tensor | None, scaling: float | Tensor) -> Linear:
    return y.fold(_change(spectrum * scaling, indices, filters, tuple(y.weight.shape)))


def waveft_linear(
    x: Tensor, weight: Tensor, spectrum: Tensor, indices: Tensor, filters: Tensor | None = None, *,
    bias: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with WaveFT: the equation at the top of peftkern/methods/folded/waveft.py.

    Args:
        x: (..., K). weight: (N, K). spectrum: c (n). indices: (2, n), int64, rows below N and columns below K, no two alike.
        filters: (2, L), low and high of the synthesis, L even; None: no transform. bias: (N). scaling: s. dtypes as in
            ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does. Saved for backward: x and the folded weight, in fp32.
    """
    return run(_with(Linear(weight, bias), spectrum, indices, filters, scaling), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``waveft.WaveFTLinear`` holds of an adapter."""
    (spectrum,) = tuner.tensors(look, name, {"waveft_spectrum": (None,)})
    refuse_half(name, spectrum)
    indices = look.item("waveft_indices", name)
    if not isinstance(indices, Tensor) or indices.shape != (2, spectrum.numel()):
        raise NotCovered(f"the indices of {name!r} do not fit its spectrum")
    scaling = tuner.number(look.item("waveft_scaling", name), name)
    family = look.item("waveft_wavelet_family", name) if look.item("waveft_use_idwt", name) else None
    return Held(name, WAVEFT, (spectrum,), (indices.to(spectrum.device), family, scaling))


def _filters(family: str, like: Tensor) -> Tensor:
    from peft.tuners.waveft.wavelet import Wavelet

    wavelet = Wavelet(family)
    return torch.tensor([wavelet.rec_lo, wavelet.rec_hi], dtype=like.dtype, device=like.device)


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    (spectrum,), (indices, family, scaling) = adapter.tensors, adapter.numbers
    filters = None if family is None else _filters(family, spectrum)
    return _with(y, spectrum, indices, filters, scaling)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft
    from transformers.pytorch_utils import Conv1D

    def config(**options):
        return peft.WaveFTConfig(**{"target_modules": ["0"], "n_frequency": 60, "init_weights": False, **options})

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias, all coefficients": tuner.layer(nn.Linear(K, N, bias=False), config(n_frequency=K * N)),
        "sym4": tuner.layer(nn.Linear(K, N), config(wavelet_family="sym4")),
        "no transform": tuner.layer(nn.Linear(K, N), config(use_idwt=False)),
        "Conv1D": tuner.layer(Conv1D(N, K), config(fan_in_fan_out=True)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(random_loc_seed=3, wavelet_family="db3")),
    }


WAVEFT = register(
    Method(
        name="WaveFT",
        taxonomy="reparameterised",
        family="S",
        layer="peft.tuners.waveft.layer.WaveFTLinear",
        adapters="waveft_spectrum",
        held=held,
        apply=apply,
        function=waveft_linear,
        examples=examples,
        build=tuner.builder("WaveFTConfig", None),
        rank=0,
        op="lora_linear",
        saves="x, and the folded weight in fp32",
        merges="W + s D",
        peft_type="WAVEFT",
        keeps_dtype=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
