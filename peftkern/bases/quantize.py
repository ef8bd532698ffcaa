"""Bases made of a weight, in plain torch, without a library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_tensor, check_whole
from .base import Base, computed_in
from .codebook import FP4, NF4
from .fp8 import BLOCK
from .mxfp4 import BLOCK as MX_BLOCK
from .mxfp4 import E2M1, NAN

# Blocks of bitsandbytes: elements of a weight, and scales.
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
_TINY = 1e-38


def quantize(
    weight: Tensor, kind: str, *, block_size: int | None = None, nested: bool = False, compute: str | None = None
) -> Base:
    """A base that holds a weight (N, K) in 4 or 8 bits: ``lora_linear``, ``multi_lora_linear``,
    ``LoRALinear.from_linear`` and every functional form that does not read the elements of W take it as their weight.

    ======  ===========================================================  ==============================================
    kind    codes                                                        scales
    ======  ===========================================================  ==============================================
    nf4     4-bit quantiles of a normal distribution                     fp32, per ``block_size`` elements of the flat
    fp4     4-bit floats                                                 weight (64): the largest magnitude; ``nested``:
                                                                         8-bit codes of them, in blocks of 256
    int8    -127 to 127                                                  fp32, per row: the largest magnitude / 127
    int4    0 to 15, in a row's groups of ``block_size`` (64)            bf16, with a whole number as zero
    fp8     e4m3                                                         fp32, per row; ``block_size=128``: per block
    mxfp4   e2m1, in a row's blocks of 32                                powers of two
    ======  ===========================================================  ==============================================

    nf4, fp4 and int8 are those of bitsandbytes on a CPU. Codes are the nearest, in fp32; peftkern/bases says how each is
    laid out and what weight it is. An element that is not finite leaves none that is in what shares its scale.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64. It is not kept.
        kind: see above. Bases of other kinds are read, not made.
        block_size: a power of two from 32 to 4096 for nf4 and fp4, an even divisor of K for int4, 128 for fp8.
        nested: quantise the scales of nf4 or fp4 as well.
        compute: "int8" for int8: the rows that meet the weight are rounded to 8 bits as well, by their largest magnitude,
            in the forward pass and in that of the gradient of x. That changes both by about 1 % (peftkern/bases/int8.py).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (N, K)")
    if kind not in _MAKERS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(_MAKERS)}")
    if block_size is not None:
        check_whole("block_size", block_size, 1)
    maker = _MAKERS[kind]
    size = maker.block if block_size is None else block_size
    if not maker.fits(weight.shape[1], size):
        raise ValueError(f"{kind} has no block_size {size} for a weight of {tuple(weight.shape)}: {maker.expected}")
    if nested and kind not in ("nf4", "fp4"):
        raise ValueError(f"nested is for the scales of nf4 and fp4, {kind} has none that could be quantised")
    with torch.no_grad():
        tensors = maker.make(weight.detach().float(), size)
        parts = (tensors[0], *_nested(tensors[1])) if nested else tensors
        return computed_in(Base(kind, parts, tuple(weight.shape)), compute)


def _nearest(values: Tensor, code: Tensor) -> Tensor:
    """Places in ``code`` (any order) of the values nearest to these, of two equally near the lesser."""
    ordered, order = code.sort(stable=True)
    return order.to(torch.uint8)[torch.bucketize(values, (ordered[:-1] + ordered[1:]) / 2, out_int32=True)]


def _scaled(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(values over the largest magnitude of their block, those magnitudes)."""
    n = flat.numel()
    full = n // block * block
    blocks = flat[:full].view(full // block, block)
    absmax = blocks.abs().amax(dim=1)
    values = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).flatten()
    if full < n:  # divided, as bitsandbytes does there
        last = flat[full:].abs().max().clamp(min=_TINY)
        values, absmax = torch.cat((values, flat[full:] / last)), torch.cat((absmax, last[None]))
    return values.clamp(-1, 1), absmax


def dynamic_code() -> Tensor:
    """The 256 values of bitsandbytes' signed dynamic type (Dettmers 2015), fp32 (256,), in order.

    In the decade below 10^-e, for e from 0 to 6, lie 2^(6 - e) values of each sign, in the middle of equal parts of it.
    """
    values = [0.0, 1.0]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (6 - e) + 1)
        middles = (10.0**-e * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-v for v in middles]
    return torch.tensor(sorted(values))


def _codebook(code: tuple[float, ...], W: Tensor, block: int) -> tuple[Tensor, ...]:
    values, absmax = _scaled(W.flatten(), block)
    if values.numel() % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    q = _nearest(values, torch.tensor(code, device=W.device))
    return ((q[::2] << 4) | q[1::2])[:, None], absmax


def _nested(absmax: Tensor) -> tuple[Tensor, ...]:
    offset, code2 = absmax.mean() if absmax.numel() else absmax.new_zeros(()), dynamic_code().to(absmax.device)
    values, absmax2 = _scaled(absmax - offset, NESTED_BLOCK)
    return _nearest(values, code2), code2, absmax2, offset


def _int8(W: Tensor, block: int | None) -> tuple[Tensor, ...]:
    absmax = W.abs().amax(dim=1) if W.numel() else W.new_zeros(W.shape[0])
    scale = 127.0 / absmax.clamp(min=_TINY)
    return (W * scale[:, None]).round().to(torch.int8), absmax / 127.0


def _int4(W: Tensor, group: int) -> tuple[Tensor, ...]:
    N, K = W.shape
    groups = W.view(N, K // group, group)
    low, high = (f(dim=2).clamp(**{side: 0.0}) for f, side in ((groups.amin, "max"), (groups.amax, "min")))
    scale = ((high - low) / 15).bfloat16()
    step = scale.float().clamp(min=_TINY)
    zero = (-low / step).round().clamp(0, 15)
    q = (groups / step[..., None] + zero[..., None]).round().clamp(0, 15).to(torch.uint8).view(N, K)
    return q[:, ::2] | (q[:, 1::2] << 4), scale, zero.bfloat16()


def _fp8(W: Tensor, block: int | None) -> tuple[Tensor, ...]:
    (N, K), most = W.shape, torch.finfo(torch.float8_e4m3fn).max
    if block is None:
        scale = (W.abs().amax(dim=1) if W.numel() else W.new_zeros(N)) / most
        each = scale[:, None]
    else:
        rows, columns = -(-N // block), -(-K // block)
        padded = torch.nn.functional.pad(W, (0, columns * block - K, 0, rows * block - N))
        scale = padded.abs().view(rows, block, columns, block).amax(dim=(1, 3)) / most
        each = scale.repeat_interleave(block, 0)[:N].repeat_interleave(block, 1)[:, :K]
    return (W / each.clamp(min=_TINY)).clamp(-most, most).to(torch.float8_e4m3fn), scale


def _mxfp4(W: Tensor, block: int) -> tuple[Tensor, ...]:
    N, K = W.shape
    blocks = W.view(N, K // block, block)
    # 2^e of the largest magnitude becomes 4, the power of two in e2m1's largest binade.
    largest = blocks.abs().amax(dim=2)
    exponent = (torch.frexp(largest).exponent - 3).clamp(-127, 127)
    values = torch.ldexp(blocks, -exponent[..., None]).clamp(-6, 6)
    steps = torch.tensor(E2M1[:8], device=W.device)
    q = _nearest(values.abs(), steps) | (values.signbit().to(torch.uint8) << 3)
    scales = torch.where(largest.isfinite(), exponent + 127, NAN)
    return q[..., ::2] | (q[..., 1::2] << 4), scales.to(torch.uint8)


class _Maker(NamedTuple):
    """``make``: its tensors of W in fp32 and a block size; ``block``: its own; ``fits``: whether it has one for this K."""

    make: Callable[[Tensor, int | None], tuple[Tensor, ...]]
    block: int | None
    fits: Callable[[int, int | None], bool]
    expected: str


def _in_blocks(K: int, size: int | None) -> bool:
    return size in BLOCKS


_POWERS = "a power of two from 32 to 4096"
_MAKERS = {
    "nf4": _Maker(functools.partial(_codebook, NF4), 64, _in_blocks, _POWERS),
    "fp4": _Maker(functools.partial(_codebook, FP4), 64, _in_blocks, _POWERS),
    "int8": _Maker(_int8, None, lambda K, size: size is None, "rows are its blocks"),
    "int4": _Maker(
        _int4, 64, lambda K, size: size > 0 and size % 2 == 0 and K % size == 0, "an even divisor of in_features"
    ),
    "fp8": _Maker(_fp8, None, lambda K, size: size in (None, BLOCK), "128, or none for rows"),
    "mxfp4": _Maker(
        _mxfp4, MX_BLOCK, lambda K, size: size == MX_BLOCK and K % size == 0, "32, which divides in_features"
    ),
}
