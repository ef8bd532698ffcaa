"""Weights of quantisation libraries as bases that share their storage. No library is imported: their classes are known by name.

    bitsandbytes     Params4bit, Linear4bit          nf4, fp4     Int8Params, Linear8bitLt     int8, scale = SCB / 127
    torchao          Int8Tensor                      int8         Float8Tensor                 fp8
                     Int4Tensor                      int4
    optimum.quanto   weights in qint8                int8         weights in qfloat8           fp8
                     weights in qint4                quanto4
    hqq              HQQLinear in 4 bits, axis=1     hqq4

Only scales that a kind has in another form are copied: a number for each row, two for each group of a weight with shifts
(affine.py), or none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .affine import quanto_qint4, torchao_int4
from .fp8 import BLOCK
from .once import once

Held = tuple[str, tuple[Tensor, ...], tuple[int, int]]


def held(weight: object) -> Held | None:
    """(kind, tensors, (N, K)) of a library's weight or layer; None of anything else.

    Raises ValueError for one that no kind is, or that would not train, with the reason.
    """
    for cls in type(weight).__mro__:
        package = cls.__module__.partition(".")[0]
        if (package, cls.__name__) in _READERS:
            return _READERS[package, cls.__name__](weight)
        if (package, cls.__name__) in _REFUSED:
            raise ValueError(_REFUSED[package, cls.__name__])
    return None


def _rows(scale: Tensor, N: int) -> Tensor:
    """A scale for each row, or one for all, as (N,)."""
    return scale.reshape(N) if scale.numel() == N else scale.reshape(1).expand(N).contiguous()


def _params4bit(weight: Tensor) -> Held:
    state = weight.quant_state
    if state is None:
        raise ValueError("the Params4bit is not quantised yet: move its layer to a device")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has repacked this Params4bit for inference on this CPU, as it does in eval mode without gradients"
        )
    codes = weight.detach()
    codes = codes if codes.dtype == torch.uint8 else codes.view(torch.uint8)
    scales = (state.absmax,)
    if state.nested:
        scales = state.absmax, state.state2.code, state.state2.absmax, state.offset
    return state.quant_type, (codes, *scales), tuple(state.shape)


@once
def over_127(scale: Tensor) -> Tensor:
    """Scales of int8 as bitsandbytes holds them, of codes 127; made once for as long as they stay as they are."""
    return scale / 127.0


def _int8(codes: Tensor, scale: Tensor | None) -> Held:
    if codes.dtype != torch.int8:
        raise ValueError(
            f"the Int8Params has dtype {codes.dtype}: it is not quantised yet, or keeps weights in half precision"
        )
    if scale is None:
        raise ValueError("the Int8Params has handed its scales to its layer: pass the Linear8bitLt")
    return "int8", (codes.detach(), over_127(scale)), tuple(codes.shape)


def _linear8bit(layer) -> Held:
    weight, state = layer.weight, layer.state
    return _int8(weight, state.SCB if weight.SCB is None else weight.SCB)


def _torchao_int8(weight) -> Held:
    _weight_only(weight)
    if weight.act_pre_scale is not None:
        raise ValueError("the Int8Tensor scales its input (act_pre_scale): that is no part of a weight")
    N, K = weight.qdata.shape
    if weight.block_size[-1] != K:
        raise ValueError(
            f"the Int8Tensor has scales for groups of {weight.block_size[-1]}: kind int8 has one for each row"
        )
    return "int8", (weight.qdata, _rows(weight.scale, N)), (N, K)


def _torchao_fp8(weight) -> Held:
    _weight_only(weight)
    (N, K), scale, block = weight.qdata.shape, weight.scale.float(), list(weight.block_size or ())
    if scale.numel() == 1:
        scale = scale.reshape(1)
    elif block == [1, K]:
        scale = scale.reshape(N)
    elif block != [BLOCK, BLOCK]:
        raise ValueError(f"the Float8Tensor has scales for blocks of {block}, expected rows, 128 x 128 or one for all")
    return "fp8", (weight.qdata, scale), (N, K)


def _weight_only(weight) -> None:
    if weight.act_quant_kwargs is not None:
        raise ValueError(
            f"torchao's {type(weight).__name__} with dynamic activations gives no gradient through the layer, so that adapters "
            "before it would stay as they are: quantise weights alone (Int8WeightOnlyConfig)"
        )


def _quanto(weight) -> Held:
    codes, scale = weight._data, weight._scale
    if weight.axis not in (0, None):
        raise ValueError("the WeightQBytesTensor has scales for columns: a kind has them for rows")
    if codes.dtype == torch.int8:
        return "int8", (codes, _rows(scale, codes.shape[0])), tuple(codes.shape)
    return "fp8", (codes, scale.float().reshape(-1)), tuple(codes.shape)


def _hqq(layer) -> Held:
    meta = layer.meta
    if meta is None:
        raise ValueError("the HQQLinear is not quantised yet")
    if meta["nbits"] != 4 or meta["axis"] != 1 or meta["packing"] != "4bit_u8" or meta["view_as_float"]:
        raise ValueError(
            f"the HQQLinear has {meta['nbits']} bits along axis {meta['axis']}, packed as {meta['packing']}: kind hqq4 has 4 "
            "along axis 1, packed as 4bit_u8"
        )
    if meta.get("quant_scale") or meta.get("quant_zero"):
        raise ValueError("the HQQLinear has quantised scales or zeros: kind hqq4 has floats")
    # HQQ leaves the zeros of an fp32 layer as a tensor of inference mode, which autograd cannot keep.
    zero = meta["zero"].clone() if meta["zero"].is_inference() else meta["zero"]
    return "hqq4", (layer.W_q.detach(), meta["scale"], zero), tuple(meta["shape"])


# By package and class.
_READERS: dict[tuple[str, str], Callable[..., Held]] = {
    ("bitsandbytes", "Params4bit"): _params4bit,
    ("bitsandbytes", "Linear4bit"): lambda layer: _params4bit(layer.weight),
    ("bitsandbytes", "Int8Params"): lambda weight: _int8(weight, weight.SCB),
    ("bitsandbytes", "Linear8bitLt"): _linear8bit,
    ("torchao", "Int8Tensor"): _torchao_int8,
    ("torchao", "Float8Tensor"): _torchao_fp8,
    ("torchao", "Int4Tensor"): torchao_int4,
    ("optimum", "WeightQBytesTensor"): _quanto,
    ("optimum", "WeightQBitsTensor"): quanto_qint4,
    ("hqq", "HQQLinear"): _hqq,
}
_NO_KIND = "is none of the kinds that peftkern/bases has: "
_REPACKED = (
    "quanto has repacked this weight for a kernel of its own, in a layout that depends on the device: "
    "weight.weight_qbits_tensor() is the same weight as a kind reads it"
)
_REFUSED = {
    ("torchao", "NF4Tensor"): f"torchao's NF4Tensor {_NO_KIND}its 16 values are rounded to four decimals and then to "
    "the weight's dtype, those of kind nf4 are not, and its nested scales are int8",
    ("torchao", "TorchAOBaseTensor"): f"this tensor of torchao {_NO_KIND}of torchao they are Int8Tensor, Float8Tensor and "
    "Int4Tensor",
    ("optimum", "AWQWeightQBitsTensor"): _REPACKED,
    ("optimum", "TinyGemmWeightQBitsTensor"): _REPACKED,
    ("optimum", "MarlinInt4WeightQBitsTensor"): _REPACKED,
    ("optimum", "MarlinF8QBytesTensor"): "quanto has repacked this weight in qfloat8 for its Marlin kernel, in a layout of "
    "no kind",
    ("optimum", "QTensor"): f"this tensor of quanto {_NO_KIND}of quanto they are weights in qint8, qfloat8 and qint4",
}  # fmt: skip
