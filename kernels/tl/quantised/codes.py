"""A frozen weight in codes of 4 or 8 bits: one description of every layout, and the loader that reads tiles of it.

    W[n, k] = (value(code[n, k]) - zero[g]) * scale[g]        g the group of codes that share a scale

Code p = n * row + k lies in run p // RUN, which has RUN codes in HALF bytes and begins RUN_BYTES after the one before: code i
of a run in byte i % HALF, those from HALF on in the other four bits. With RUN = HALF a code has a byte to itself. All numbers
are decoded in fp32, in the order of the equation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Codes(NamedTuple):
    """What a kernel is given in place of a dense W, constants as ``tl.constexpr``.

    codes: bytes, uint8 or int8. lookup: what they stand for, fp32, by code; None: themselves. zeros: None if there are none.
    book: scales are codes of 8 bits, of which it has the values, times outer[g // OUTER] + offset, if those are given.
    row, pitch: codes and bytes from a row of W to the next; the pitch is used where runs do not straddle rows (WHOLE).
    LONG: a row is in one half of a run. UPPER: the first half of a run is in the upper bits.
    The group of (n, k): (n * row + k) // GROUP if FLAT, else n // ROWS * groups + k // GROUP, without the part whose divisor
    is 0. STEP: from a scale to the next. SPAN: so many neighbours from a multiple of SPAN on are in one group, a power of two.
    """

    codes: Tensor
    scales: Tensor
    lookup: Tensor | None
    zeros: Tensor | None
    book: Tensor | None
    outer: Tensor | None
    offset: Tensor | None
    row: int
    pitch: int
    groups: int
    RUN: tl.constexpr
    RUN_BYTES: tl.constexpr
    HALF: tl.constexpr
    UPPER: tl.constexpr
    WHOLE: tl.constexpr
    LONG: tl.constexpr
    FLAT: tl.constexpr
    GROUP: tl.constexpr
    ROWS: tl.constexpr
    STEP: tl.constexpr
    SPAN: tl.constexpr
    OUTER: tl.constexpr


@dataclass(frozen=True)
class Quantised:
    """A weight (N, K) in codes, or its transpose: stands where launchers take a matrix."""

    codes: Codes
    shape: tuple[int, int]
    transposed: bool = False

    def t(self) -> Quantised:
        """The transpose, of the same memory."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)


@triton.jit
def _group_scales(w, n, k0, inside_n, K, BLOCK: tl.constexpr):
    """(scales, zeros or 0) of rows n and BLOCK columns from k0 on, each such that it broadcasts; 0 outside."""
    SPAN: tl.constexpr = w.SPAN if w.SPAN < BLOCK else BLOCK
    SPANS: tl.constexpr = BLOCK // SPAN
    if SPANS > 1:
        n, k = n[:, None], k0 + tl.arange(0, SPANS)[None, :] * SPAN
        inside = inside_n[:, None] & (k < K)
    else:
        # One to a row: a vector, since the compiler gives each thread the whole of a matrix with a single column.
        k, inside = k0, inside_n
    if w.FLAT:
        g = (n.to(tl.int64) * w.row + k) // w.GROUP
    else:
        g = n.to(tl.int64) // w.ROWS * w.groups if w.ROWS > 0 else n.to(tl.int64) * 0
        if w.GROUP > 0:
            g += k // w.GROUP
    s = tl.load(w.scales + g * w.STEP, mask=inside, other=0)
    if w.book is not None:
        s = tl.load(w.book + s.to(tl.int32))
    s = s.to(tl.float32)
    if w.outer is not None:
        s = s * tl.load(w.outer + g // w.OUTER, mask=inside, other=0.0)
        s = s + tl.load(w.offset)
    s = _spread(tl.where(inside, s, 0.0), SPAN)
    zero = 0.0
    if w.zeros is not None:
        zero = _spread(tl.load(w.zeros + g, mask=inside, other=0.0).to(tl.float32), SPAN)
    return s, zero


@triton.jit
def _spread(t, SPAN: tl.constexpr):
    """Each column SPAN times; a vector as the only column."""
    if len(t.shape) == 1:
        t = t[:, None]
    else:
        wide = tl.broadcast_to(t[:, :, None], (t.shape[0], t.shape[1], SPAN))
        t = tl.reshape(wide, (t.shape[0], t.shape[1] * SPAN))
    return t


@triton.jit
def _codes(w, n, k0, inside_n, K, BLOCK: tl.constexpr):
    """The codes of rows n and BLOCK columns from k0 on, (rows, BLOCK) in the dtype of w.codes; 0 outside."""
    RUNS: tl.constexpr = BLOCK // w.RUN
    BYTES: tl.constexpr = RUNS * w.HALF
    if w.WHOLE and RUNS * w.RUN == BLOCK:
        # A run is in one row and in one tile: each byte is read once. Masks count bytes, whole vectors of which then share one;
        # rows that are farther apart than they are long have a code to a byte.
        b = tl.arange(0, BYTES)
        if w.RUN_BYTES == w.HALF:
            at = k0 // w.RUN * w.HALF + b
            if w.RUN == 1:
                inside_k = at < K
            else:
                inside_k = at < w.pitch
        else:
            at = (k0 // w.RUN + b // w.HALF) * w.RUN_BYTES + b % w.HALF
            inside_k = k0 + b // w.HALF * w.RUN < K
        place = w.codes + n.to(tl.int64)[:, None] * w.pitch + at[None, :]
        q = tl.load(place, mask=inside_n[:, None] & inside_k[None, :], other=0)
        if w.RUN > w.HALF:
            if w.UPPER:
                both = tl.join(q >> 4, q & 15)
            else:
                both = tl.join(q & 15, q >> 4)
            if w.HALF > 1:
                both = tl.reshape(both, (n.shape[0], RUNS, w.HALF, 2))
                both = tl.permute(both, (0, 1, 3, 2))
            q = tl.reshape(both, (n.shape[0], BLOCK))
    elif w.LONG:
        k = k0 + tl.arange(0, BLOCK)
        first = n.to(tl.int64) * w.row
        place = w.codes + (first // w.RUN * w.RUN_BYTES + first % w.HALF)[:, None] + k[None, :]
        q = tl.load(place, mask=inside_n[:, None] & (k < K)[None, :], other=0)
        if w.RUN > w.HALF:
            q = tl.where(((first % w.RUN >= w.HALF) == w.UPPER)[:, None], q & 15, q >> 4)
    else:
        k = k0 + tl.arange(0, BLOCK)
        p = n.to(tl.int64)[:, None] * w.row + k[None, :]
        i = p % w.RUN
        place = w.codes + p // w.RUN * w.RUN_BYTES + i % w.HALF
        q = tl.load(place, mask=inside_n[:, None] & (k < K)[None, :], other=0)
        if w.RUN > w.HALF:
            q = tl.where((i >= w.HALF) == w.UPPER, q & 15, q >> 4)
    return q


@triton.jit
def decode(w, n, k0, N, K, BLOCK: tl.constexpr):
    """W at rows n (1-d) and columns k0, ..., k0 + BLOCK - 1, in fp32; 0 outside (N, K). k0 < K is a multiple of BLOCK."""
    inside_n = n < N
    q = _codes(w, n, k0, inside_n, K, BLOCK)
    if w.lookup is not None:
        # Through shared memory. Loads of a value each would be laid out anew, and copied ahead where a loop is pipelined.
        VALUES: tl.constexpr = 16 if w.RUN > w.HALF else 256
        table = tl.load(w.lookup + tl.arange(0, VALUES))
        value = tl.gather(table, tl.reshape(q.to(tl.int32), (n.shape[0] * BLOCK,)), 0)
        value = tl.reshape(value, (n.shape[0], BLOCK))
    else:
        value = q.to(tl.float32)
    scale, zero = _group_scales(w, n, k0, inside_n, K, BLOCK)
    if w.zeros is not None:
        value = value - zero
    return value * scale
