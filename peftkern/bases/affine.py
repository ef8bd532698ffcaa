"""Weights of libraries in 4 bits with a shift for each group, as kinds whose codes share their storage.

    torchao          Int4Tensor (plain layout)       int4, codes int8      W = q * scale + zero_point
    optimum.quanto   WeightQBitsTensor in qint4      quanto4               W = q * scale - shift, or (q - shift) * scale
                                                                           of an integer shift

A kind has W = (q - zero) * scale: scale and zero = shift / scale are made in fp32, 8 bytes for each group, once for as long as
the library's stay as they are. It computes in fp32, where the libraries round each step to their scales' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .once import once

# Below this part of the shift a step is lost in the rounding of q * scale - shift, whatever q is.
_LOST = 2.0**-40


def scale_and_zero(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """(scale', zero) in fp32 such that (q - zero) * scale' = q * scale - shift, to rounding, for q from -8 to 15.

    A group of equal elements may have a scale of 0, and its shift says all: its scale' is too small for q to count.
    """
    scale, shift = scale.float(), shift.float()
    least = shift.abs() * _LOST
    scale = torch.where(scale.abs() > least, scale, least)
    return scale, torch.where(scale == 0, 0.0, shift / scale)


@once
def _torchao_scales(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    return scale_and_zero(scale.t().contiguous(), -zero_point.t().contiguous())


@once
def _quanto_scales(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    if shift.dtype.is_floating_point:
        return scale_and_zero(scale.contiguous(), shift.contiguous())
    return scale.float().contiguous(), shift.float().contiguous()


def torchao_int4(weight) -> tuple[str, tuple[Tensor, ...], tuple[int, int]]:
    """(kind, tensors, (N, K)) of an ``Int4Tensor``: codes (N, K / 2), two's complement, scale and zero_point (G, N).

    Raises ValueError for one that is more than a weight, or no matrix in groups along K.
    """
    if weight.act_pre_scale is not None:
        raise ValueError("the Int4Tensor scales its input (act_pre_scale): that is no part of a weight")
    if weight.activation_dtype != torch.bfloat16:
        raise ValueError(f"the Int4Tensor rounds its input to {weight.activation_dtype}: that is no part of a weight")
    codes, scale, block = weight.qdata, weight.scale, list(weight.block_size)
    if codes.dim() != 2 or scale.dim() != 2:
        raise ValueError(f"the Int4Tensor has shape {tuple(weight.shape)}: kind int4 is a matrix")
    N, K = codes.shape[0], 2 * codes.shape[1]
    if len(block) != 2 or block[0] != 1 or scale.shape != (-(-K // max(block[1], 1)), N):
        raise ValueError(f"the Int4Tensor has scales for blocks of {block}: kind int4 has them for groups along K")
    scale, zero = _torchao_scales(scale, weight.zero_point)
    return "int4", (codes.view(torch.int8), scale, zero), (N, K)


def quanto_qint4(weight) -> tuple[str, tuple[Tensor, ...], tuple[int, int]]:
    """(kind, tensors, (N, K)) of a ``WeightQBitsTensor``: codes of G groups of the flat weight, group i in the lower bits of
    row i, group i + G / 2 in the upper ones; scale and shift (G, 1).

    Raises ValueError for other bits, axes and packings, and for an odd number of groups.
    """
    name, packed = weight.qtype.name, weight._data
    if name != "qint4" or weight.axis != 0 or weight.dim() != 2:
        raise ValueError(
            f"the WeightQBitsTensor is {name} of shape {tuple(weight.shape)} along axis {weight.axis}: kind quanto4 is a "
            "matrix in qint4 along axis 0"
        )
    if type(packed).__name__ != "PackedTensor":
        raise ValueError(
            f"the WeightQBitsTensor holds a {type(packed).__name__}: kind quanto4 is quanto's PackedTensor"
        )
    if packed.shape[0] % 2:
        raise ValueError(
            f"the WeightQBitsTensor has {packed.shape[0]} groups, so that half of the last row of codes is empty: kind quanto4 "
            "has an even number"
        )
    return "quanto4", (packed._data, *_quanto_scales(weight._scale, weight._shift)), tuple(weight.shape)
