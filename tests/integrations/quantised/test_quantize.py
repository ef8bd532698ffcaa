"""``quantize`` beside the libraries: the same codes and scales, the same weight."""

from __future__ import annotations

import bitsandbytes.functional as F
import gguf
import numpy as np
import pytest
import torch

from peftkern import quantize
from peftkern.bases.base import Base, kind_of
from peftkern.bases.quantize import BLOCKS, dynamic_code

# Whole blocks in rows, blocks across rows, an odd number of elements, less than a block, a block of zeros.
SHAPES = [(64, 256), (33, 96), (33, 65), (1, 7), (300, 517)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def random(shape, dtype=torch.float32):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    W.view(-1)[: min(64, W.numel() // 2)] = 0
    return W


def dequantised(base, shape, dtype=torch.float32):
    return kind_of(base.kind).dequantise(base.tensors, dtype, shape)


@DTYPES
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_four_bits(kind, shape, dtype):
    W = random(shape, dtype)
    for block in BLOCKS:
        codes, state = F.quantize_4bit(W, blocksize=block, quant_type=kind)
        base = quantize(W, kind, block_size=block)
        assert (
            base.shape == shape and torch.equal(base.tensors[0], codes) and torch.equal(base.tensors[1], state.absmax)
        )


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 256), (33, 65)], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_the_weight_is_what_the_library_dequantises(kind, shape, nested):
    W = random(shape)
    base = quantize(W, kind, nested=nested)
    codes, state = F.quantize_4bit(W, quant_type=kind, compress_statistics=nested)
    tensors = (codes, state.absmax)
    if nested:
        tensors = (codes, state.absmax, state.state2.code, state.state2.absmax, state.offset)
    kind_of(kind).check(tensors, W, shape[1], shape[0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = dtype
        assert torch.equal(dequantised(Base(kind, tensors), shape, dtype), F.dequantize_4bit(codes, state))
    assert (dequantised(base, shape) - dequantised(Base(kind, tensors), shape)).abs().max() < 0.02


def test_nested_scales():
    W = random((300, 517))
    _, a, code2, absmax2, offset = quantize(W, "nf4", nested=True).tensors
    _, state = F.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    assert torch.equal(code2, dynamic_code()) and torch.equal(code2, state.state2.code)
    assert torch.equal(absmax2, state.state2.absmax) and torch.equal(offset, state.offset)
    # The library's kernel takes the farther of two neighbours now and then, of scales about halfway between them.
    other = a != state.absmax
    assert other.float().mean() < 0.01 and (a.int() - state.absmax.int()).abs().max() <= 1
    scale = F.quantize_4bit(W, quant_type="nf4")[1].absmax - offset
    unit = absmax2.repeat_interleave(256)[: a.numel()]
    ours, theirs = ((code2[q.int()] * unit - scale).abs() for q in (a, state.absmax))
    assert (ours <= theirs + 1e-6).all()


@pytest.mark.parametrize("shape", [(64, 128), (5, 7)], ids=str)
def test_eight_bits(shape):
    W = random(shape, torch.float16)
    W[1] = 0
    codes, SCB, _ = F.int8_vectorwise_quant(W)
    base = quantize(W, "int8")
    assert torch.equal(base.tensors[0], codes) and torch.equal(base.tensors[1], SCB / 127.0)
    torch.testing.assert_close(dequantised(base, shape), F.int8_vectorwise_dequant(codes, SCB), rtol=3e-7, atol=0)


@pytest.mark.parametrize("kind, of", [("q4_0", "Q4_0"), ("q8_0", "Q8_0")])
def test_gguf(kind, of):
    W, of = random((9, 96)), gguf.GGMLQuantizationType[of]
    raw = gguf.quants.quantize(W.numpy(), of)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, of))
    base = Base(kind, (torch.from_numpy(np.ascontiguousarray(raw)),))
    assert kind_of(kind).check(base.tensors, W, 96, 9) == (9, 96)
    assert torch.equal(dequantised(base, (9, 96)), expected)


def test_mxfp4_is_what_transformers_reads():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    base = quantize(random((10, 96)), "mxfp4")
    blocks, scales = base.tensors
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].t()
    assert torch.equal(dequantised(base, (10, 96)), expected)
