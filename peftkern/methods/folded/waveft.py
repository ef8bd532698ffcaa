"""WaveFT (Bilican et al. 2025) on a linear layer, as HF PEFT computes it: some wavelet coefficients of the weight's change train.

    y = x (W + s D)^T + bias,    D = one inverse 2D wavelet transform of c (n) at indices (2, n), else 0; or c itself there

A coefficient adds to L x L entries of the weight, L the length of the filters: so nothing is transformed. The library transforms
the whole matrix. Its sides are padded to even sizes by what the transform cuts off, half of it in front. It filters the rows of
its upper right quarter and the columns of its lower left one as high frequencies, which is the other way round than usual.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...checks import check_parts, check_scaling
from .. import tuner
from ..exact import made_of, places, refuse_half, wide
from ..linear import Linear, run
from ..look import Look, NotCovered
from ..registry import Held, Method, register
from . import models

# How often an adapter may add to the entries of the weight: each to so many of them on the average, beyond which a transform of
# the whole matrix is faster, and all in all, since their places take memory.
EACH, MOST = 8, 1 << 24


def _side(positions: Tensor, size: int, L: int) -> tuple[Tensor, Tensor]:
    # Of coefficients along one side of the matrix: whether they are in the second half of the padded side, and the L places
    # (n, L) that they add to, some of them outside.
    padded = size + L - 2
    padded += padded % 2
    positions = positions + (padded - size) // 2
    first = positions % (padded // 2) * 2 - (L - 2)
    return positions // (padded // 2), first[:, None] + torch.arange(L, device=positions.device)


def _entries(
    indices: Tensor, filters: Tensor | None, shape: tuple[int, int]
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    # Rows and columns (n L L) of all that the coefficients add to, and by how much (n, L L); without filters, themselves.
    if filters is None:
        return indices.clone().unbind(), None
    rows, columns = indices
    (N, K), L = shape, filters.shape[1]
    (below, rows), (right, columns) = _side(rows, N, L), _side(columns, K, L)
    inside = ((rows >= 0) & (rows < N))[:, :, None] & ((columns >= 0) & (columns < K))[:, None]
    taps = torch.where(inside, filters[right][:, :, None] * filters[below][:, None], 0.0)
    at = rows.clamp(0, N - 1)[:, :, None], columns.clamp(0, K - 1)[:, None]
    return tuple(t.expand(inside.shape).flatten() for t in at), taps.flatten(1)


def _with(y: Linear, spectrum: Tensor, entries: tuple, scaling: float | Tensor) -> Linear:
    at, taps = entries
    values = wide(spectrum) * scaling
    if taps is not None:
        values = (values[:, None] * taps).flatten()
    return y._replace(folded=wide(y.whole_weight()).index_put(at, values, accumulate=True))


def waveft_linear(
    x: Tensor, weight: Tensor, spectrum: Tensor, indices: Tensor, filters: Tensor | None = None, *,
    bias: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with WaveFT: the equation at the top of peftkern/methods/folded/waveft.py.

    Args:
        x: (..., K). weight: (N, K). spectrum: c (n). indices: (2, n), int64, rows below N and columns below K; what names an
            entry twice adds up. filters: (2, L), low and high of the synthesis, L even; None: no transform. bias: (N).
            scaling: s. dtypes as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does. Saved for backward: x and the folded weight, in fp32.
    """
    check_parts(
        weight, bias, spectrum=(spectrum, "n"), indices=(indices, "2 n", tuple(weight.shape)),
        **({} if filters is None else {"filters": (filters, "2 L")}),
    )  # fmt: skip
    if filters is not None and (filters.shape[1] % 2 or not filters.numel()):
        raise ValueError(f"filters have shape {tuple(filters.shape)}, expected (2, L) with an even L")
    check_scaling(scaling, weight)
    entries = _entries(indices, None if filters is None else wide(filters), tuple(weight.shape))
    return run(_with(Linear(weight, bias), spectrum, entries, scaling), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``waveft.WaveFTLinear`` holds of an adapter."""
    (spectrum,) = tuner.tensors(look, name, {"waveft_spectrum": (None,)})
    refuse_half(name, spectrum)
    scaling = tuner.number(look.item("waveft_scaling", name), name)
    family = look.item("waveft_wavelet_family", name) if look.item("waveft_use_idwt", name) else None
    if family is not None:
        try:
            L = _filters(family).shape[1]
        except ValueError as error:  # as the library's forward raises
            raise NotCovered(f"the wavelet of {name!r} has no filters") from error
        if spectrum.numel() * L**2 > min(EACH * shape[0] * shape[1], MOST):
            raise NotCovered(f"the filters of {name!r} are long, and its coefficients many")
    return Held(name, WAVEFT, (spectrum, places(look, "waveft_indices", name, spectrum)), (family, scaling))


@functools.cache
def _filters(family: str) -> Tensor:
    from peft.tuners.waveft.wavelet import Wavelet

    wavelet = Wavelet(family)
    return torch.tensor([wavelet.rec_lo, wavelet.rec_hi], dtype=torch.float64)


def _of_family(indices: Tensor, family: str | None, shape: tuple[int, int], dtype: torch.dtype) -> tuple:
    at, taps = _entries(indices, None if family is None else _filters(family).to(indices.device), shape)
    return at, None if taps is None else taps.to(dtype)


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    (spectrum, indices), (family, scaling) = adapter.tensors, adapter.numbers
    entries = made_of(indices, _of_family, family, tuple(y.weight.shape), wide(spectrum).dtype)
    return _with(y, spectrum, entries, scaling)


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
        examples=models.examples(
            "WaveFTConfig",
            {"wavelet_family": "db3"},
            {"sym4": {"wavelet_family": "sym4"}, "no transform": {"use_idwt": False}},
        ),
        build=models.builder("WaveFTConfig", 2592),
        rank=0,
        op="lora_linear",
        saves="x, and the folded weight in fp32",
        merges="W + s D",
        peft_type="WAVEFT",
        keeps_dtype=True,
        dense=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)
