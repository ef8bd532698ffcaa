"""dropout_mask: the bits that every back end keeps for a seed.

Element (i, j) of an (M, K) matrix takes one 32-bit word z(seed, i, j) and is kept iff z >= floor(p * 2^32).
The words come from Philox4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011), key = seed, counter = (j >> 3, i), both 64-bit. One call yields four words for the eight
columns of a group: column e of the group takes word e >> 1, rotated by 16 bits if e is odd. So each element has
a uniform 32-bit word of its own law, at half the cost of a word each; two neighbours share bits only in the
positions that matter with probability 2^-16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_number
from ..dispatch.registry import Size, define
from ..problem import Problem, device_arch

_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The uint32 below which an element is dropped: floor(p * 2^32), 0 <= p < 1."""
    return int(p * 2.0**32)


def _mul_hi_lo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    # int64 products wrap, which leaves both 32-bit halves right.
    product = a * m
    return (product >> 32) & _LOW, product & _LOW


def _philox(c0, c1, c2, c3, k0, k1):
    for _ in range(_ROUNDS):
        hi0, lo0 = _mul_hi_lo(c0, _MULTIPLIERS[0])
        hi1, lo1 = _mul_hi_lo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = (k0 + _WEYL[0]) & _LOW
        k1 = (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def dropout_mask_ref(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """bool (M, K), True = kept, on ``seed.device``. ``seed``: one int64 element."""
    return dropout_rows_ref(seed, torch.arange(M, device=seed.device), K, p)


def dropout_rows_ref(seed: Tensor, rows: Tensor, K: int, p: float) -> Tensor:
    """The rows of the mask that ``rows`` lists, bool (len(rows), K)."""
    device = seed.device
    seed = seed.reshape(())
    group = torch.arange((K + 7) // 8, device=device, dtype=torch.int64)[None, :]
    row = rows.to(torch.int64)[:, None]
    zero = torch.zeros((rows.numel(), group.shape[1]), device=device, dtype=torch.int64)
    counter = ((group & _LOW) + zero, (group >> 32) + zero, (row & _LOW) + zero, (row >> 32) + zero)
    words = _philox(*counter, seed & _LOW, (seed >> 32) & _LOW)
    columns = []
    for word in words:
        columns += [word, ((word << 16) & _LOW) | (word >> 16)]
    z = torch.stack(columns, dim=-1).flatten(1)[:, :K]
    return z >= threshold(p)


def check_p(p: float, name: str = "dropout_p") -> None:
    """Raise unless 0 <= p < 1."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(p).__name__}")
    if not 0.0 <= p < 1.0:
        check_number(name, p)
        raise ValueError(f"{name} must be in [0, 1), got {p}")


def acting(dropout_p: float, training: bool) -> float:
    """The probability that acts: 0 outside of training. Raises as ``check_p``."""
    check_p(dropout_p)
    return float(dropout_p) if training else 0.0


def check_seed(seed: Tensor, device: torch.device | None = None) -> None:
    """Raise unless ``seed`` is one int64 element (on ``device``)."""
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed must be an int or a tensor, got {type(seed).__name__}")
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be int64, got {seed.dtype}")
    if seed.numel() != 1:
        raise ValueError(f"seed must have one element, got shape {tuple(seed.shape)}")
    if device is not None and seed.device != device:
        raise ValueError(f"seed is on {seed.device}, expected {device} like x")


class Mask(NamedTuple):
    """Arguments of the op ``dropout_mask`` -> bool (M, K)."""

    seed: Tensor
    M: Size
    K: Size
    p: float


def _describe(c: Mask) -> Problem:
    check_seed(c.seed)
    check_p(c.p, "p")
    if c.M < 0 or c.K < 0:
        raise ValueError(f"M and K must not be negative, got M={c.M}, K={c.K}")
    device = c.seed.device
    arch = device_arch(device.type, device.index)
    return Problem("dropout_mask", device.type, arch, torch.bool, None, c.M, 0, c.K, 0, frozenset({"dropout"}))


define(
    "dropout_mask",
    Mask,
    "Tensor",
    reference=lambda c: dropout_mask_ref(*c),
    fake=lambda c: c.seed.new_empty((c.M, c.K), dtype=torch.bool),
    describe=_describe,
)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The one-element int64 tensor that the ops take. ``None`` draws one from the device's default generator."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        check_seed(seed, device)
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, a one-element int64 tensor or None, got {type(seed).__name__}")
    signed = (seed + 2**63) % 2**64 - 2**63
    return torch.full((1,), signed, dtype=torch.int64, device=device)


def dropout_mask(M: int, K: int, p: float, seed: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The mask that ``lora_linear`` applies to an (M, K) input for this seed: bool (M, K), True = kept.

    Args:
        M, K: sizes of the flattened input, both >= 0.
        p: drop probability, 0 <= p < 1, exact to 2^-32.
        seed: an int (taken modulo 2^64) or a one-element int64 tensor on ``device``.
        device: where the mask is made. The bits are the same on every device and back end.

    Raises:
        ValueError, TypeError: p outside [0, 1), negative sizes, or a seed of another type, dtype, size or device.
    """
    check_p(p, "p")
    device = seed.device if isinstance(seed, Tensor) and device == "cpu" else torch.device(device)
    if seed is None:
        raise TypeError("seed must be an int or a one-element int64 tensor, got None")
    return torch.ops.peftkern.dropout_mask(seed_tensor(seed, device), M, K, float(p))
