"""What a step should cost on a GPU that nobody has measured yet: arithmetic on sizes and data-sheet rates.

A step is a list of parts. A part takes the longer of its FLOPs at the vendor product's rate and its bytes at the memory's
rate, or nothing where it runs beside another part; parts follow each other. Left out: launches, the last wave of tiles, and
that neither rate is reached. So a sum is what a design could reach, not what it does: a calculation, never a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.case import Case

# FLOPs per second: of the data sheet, dense bf16, and what a vendor's product reaches of it as a rule.
PEAK, PRODUCT = 989e12, 700e12
# What three or two products of bf16 terms make of 16 ranks (kernels/tl/tiles.py), by the adapter's bytes per element.
RANK_DEPTH = {4: 48, 2: 32}
SHAPES = ((8192, 4096, 4096), (8192, 4096, 14336))
RANK = 16


@dataclass(frozen=True)
class Chip:
    """``bandwidth``: of memory, bytes per second, by the data sheet, as is ``peak``; ``product``: what is assumed of it."""

    name: str
    bandwidth: float
    peak: float = PEAK
    product: float = PRODUCT


CHIPS = (Chip("H100", 3.35e12), Chip("H200", 4.8e12))
A100 = Chip("A100", 2.04e12, 312e12, 220e12)


@dataclass(frozen=True)
class Part:
    """``formula`` says in words what ``flops`` and ``bytes`` are; ``beside``: the part that it runs beside, if any."""

    name: str
    formula: str
    flops: float = 0.0
    bytes: float = 0.0
    beside: str = ""

    def alone(self, chip: Chip) -> float:
        """Seconds, were it not beside another part."""
        return max(self.flops / chip.product, self.bytes / chip.bandwidth)

    def seconds(self, chip: Chip) -> float:
        """Seconds that it adds to a step."""
        return 0.0 if self.beside else self.alone(chip)


def total(parts: list[Part], chip: Chip) -> float:
    """Seconds of all parts."""
    return sum(part.seconds(chip) for part in parts)


def _depth(R: int, adapter: int) -> int:
    return -(-R // 16) * RANK_DEPTH[adapter]


def forward(M: int, K: int, N: int, R: int = RANK, *, adapter: int = 4) -> list[Part]:
    """lora_linear forward in bf16, as the kernel for Hopper does it; the base comes first. ``adapter``: bytes per element."""
    depth, terms = _depth(R, adapter), 3 if adapter == 4 else 1
    return [
        Part("base product", "2 M N K FLOPs", 2.0 * M * N * K, 2.0 * (M * K + K * N + M * N)),
        Part("low-rank term, in the product's loop", f"2 M N {depth} FLOPs", 2.0 * M * N * depth),
        Part("u = drop(x) A^T", "2 M K bytes", 2.0 * M * K * -(-R // 16) * 16 * terms, 2.0 * M * K, "the first tiles"),
    ]


def ranges_that_fill(tiles: int, most: int, slots: int) -> int:
    """As csrc/cuda/common/waves.h."""
    best, best_full = 1, 0.0
    for ranges in range(1, most + 1):
        if best_full >= 0.9:
            break
        blocks = ranges * tiles
        full = blocks / (-(-blocks // slots) * slots)
        if full > best_full:
            best, best_full = ranges, full
    return best


def shares(M: int, C: int, R: int, *, down: bool) -> float:
    """Bytes of partial sums that a pass over (M, C) for gradients writes and a second launch reads, as
    csrc/cuda/lora_grad/plan.h cuts the pass."""
    strips, most = -(-C // 256), -(-M // 192)
    ranges = ranges_that_fill(strips * -(-R // 32), most, 132 if down else 264)
    return 8.0 * R * (C * ranges * (ranges > 1) + strips * M * (down and strips > 1))


def backward(M: int, K: int, N: int, R: int = RANK, *, adapter: int = 4) -> list[Part]:
    """The backward part, likewise."""
    depth = _depth(R, adapter)
    return [
        Part("base product of dx", "2 M N K FLOPs", 2.0 * M * N * K, 2.0 * (M * K + K * N + M * N)),
        Part("its low-rank term, dropped", f"2 M K {depth} FLOPs", 2.0 * M * K * depth),
        Part("dB and du, one pass over dy", "2 M N bytes", 0.0, 2.0 * M * N),
        Part("dA, one pass over x", "2 M K bytes", 0.0, 2.0 * M * K),
        Part("their partial sums", "written and read", 0.0, shares(M, N, R, down=True) + shares(M, K, R, down=False),
             "L2"),
    ]  # fmt: skip


# Bytes per element of M x N and of M x K that HF PEFT's eager operations read and write in a step, with fp32 adapters,
# dropout and a bf16 base, beside the two base products.
EAGER_MN = {
    "B": 4, "scale": 8, "add, in fp32": 10, "cast": 6,
    "backward: casts": 12, "backward: scale": 8, "dB": 4, "du": 4,
}  # fmt: skip
EAGER_MK = {
    "cast": 6, "dropout and its mask": 9, "A": 4,
    "dA": 4, "dx of A": 4, "backward: dropout": 9, "backward: cast": 6, "backward: add": 6,
}  # fmt: skip


def eager_bytes(M: int, K: int, N: int) -> float:
    """What HF PEFT moves in a step beside the two base products: a byte count of its operations, nothing of it cached."""
    return float(sum(EAGER_MN.values()) * M * N + sum(EAGER_MK.values()) * M * K)


def decode(M: int, K: int, N: int, adapters: int, R: int = RANK, *, adapter: int = 2) -> list[Part]:
    """One step of decoding a layer with many adapters, each with rows: the base product, then the branch in place."""
    weights = float(adapter * adapters * R * (K + N))
    return [
        Part("base product", "2 (K N + M K + M N) bytes", 2.0 * M * N * K, 2.0 * (K * N + M * K + M * N)),
        Part("branch: adapters", f"{adapter} R (K + N) bytes each", 0.0, weights),
        Part("branch: x, and y read and written", "2 M (K + 2 N) bytes", 0.0, 2.0 * M * (K + 2 * N)),
    ]


def row_norm(N: int, K: int) -> list[Part]:
    """The row norms of W + s B A: one read of W."""
    return [Part("row norm", "2 N K bytes", 0.0, 2.0 * N * K)]


BOTTLENECK = (8192, 4096, 64)


def bottleneck_forward(M: int, H: int, R: int, *, adapter: int = 4) -> list[Part]:
    """bottleneck_adapter forward in bf16 with h as residual: one launch, whose blocks read their rows twice."""
    terms, matrix = 3 if adapter == 4 else 1, adapter * R * H
    return [
        Part("t = h D^T", "2 M H bytes", 2.0 * M * H * R * terms, 2.0 * M * H + matrix),
        Part("y = h + f(t) U^T", "4 M H + 4 M R bytes", 2.0 * M * H * _depth(R, adapter), 4.0 * M * H + 4.0 * M * R + matrix),
    ]  # fmt: skip


def bottleneck_backward(M: int, H: int, R: int, *, adapter: int = 4) -> list[Part]:
    """The backward part: one launch for dh, which leaves z and dt for the passes that make dU and dD."""
    deep, small = 2.0 * M * H * _depth(R, adapter), 4.0 * M * R
    first, second = bottleneck_forward(M, H, R, adapter=adapter)
    return [
        Part("dv = dy U", first.formula, first.flops, first.bytes),
        Part("dh = dy + dt D", "4 M H + 12 M R bytes", second.flops, second.bytes + 2 * small),
        Part("dU, one pass over dy", "2 M H + 4 M R bytes", deep, 2.0 * M * H + small),
        Part("dD, one pass over h", "2 M H + 4 M R bytes", deep, 2.0 * M * H + small),
    ]


# Bytes per element of M x H that AdapterHub's operations read and write, all in bf16 and without dropout.
EAGER_BOTTLENECK = {"down": 2, "up": 2, "scale": 4, "add": 6}
EAGER_BOTTLENECK_GRAD = {"scale": 4, "dz": 2, "dU": 2, "bias": 2, "dD": 2, "dh": 2, "add": 6}


def case(M: int, K: int, N: int, R: int = RANK) -> Case:
    """The problem that the tables are about: bf16, fp32 adapters, dropout 0.1."""
    return Case("lora_linear", "cuda", torch.bfloat16, torch.float32, M, K, N, R, 0.1)
