"""What the many-adapter kernels share: which rows a program takes, and where their adapter's matrices lie.

``order`` lists the rows of a batch by adapter and ``starts`` says where each adapter's begin; after the slots come the
rows without an adapter and those with an invalid id. A tile is BLOCK consecutive places of one such segment, counted
from its first place. How many tiles there are is known on the device only, so the grid covers every number that a tile
may have, and a program finds its tile, or that there is none, by one look at ``starts``:

    segment s owns the tile numbers from starts[s] // BLOCK + s on, at least as many as it has tiles

or, where that is more than one number for each row, a tile's number is its first place (``BY_ROW``).

Adapters are matrices in the tensors whose addresses ``addresses`` holds; a row of ``table`` says where. The columns are
those of ``peftkern.ops.adapter_table``. ``side_b``: B (N, R), else A (R, K). Offsets and strides are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

COLUMNS = tl.constexpr(25)
ID, RANK, A_TENSOR, A_OFFSET, A_ROW = (tl.constexpr(i) for i in range(5))
B_TENSOR, B_OFFSET, B_N, B_R = (tl.constexpr(i) for i in range(5, 9))
VECTORS = tl.constexpr(10)  # of each vector the tensor, negative where there is none, and the offset
D, P_B, P_D, G_B, G_D, BETA = (tl.constexpr(i) for i in range(6))


@triton.jit
def find_segment(starts, number, M, slots, BLOCK: tl.constexpr, BY_ROW: tl.constexpr, SEARCH: tl.constexpr):
    """(segment, its first place, its end) for a tile's number, SEARCH segments at a time."""
    count = tl.cast(0, tl.int32)
    begin = tl.cast(0, tl.int32)
    end = tl.cast(M, tl.int32)
    for first in tl.range(0, slots + 2, SEARCH, num_stages=1):
        s = first + tl.arange(0, SEARCH)
        known = s < slots + 2
        start = tl.load(starts + s, mask=known, other=M)
        if BY_ROW:
            before = known & (start <= number)
        else:
            before = known & (start // BLOCK + s <= number)
        count += tl.sum(before.to(tl.int32), axis=0)
        # Both without a second load, which would wait for the first.
        begin = tl.maximum(begin, tl.max(tl.where(before, start, 0), axis=0))
        end = tl.minimum(end, tl.min(tl.where(before, M, start), axis=0))
    return count - 1, begin, end


@triton.jit
def find_tile(starts, number, M, slots, BLOCK: tl.constexpr, BY_ROW: tl.constexpr, SEARCH: tl.constexpr):
    """(segment, first place, end of the segment); first >= end: there is no tile of that number."""
    segment, begin, end = find_segment(starts, number, M, slots, BLOCK, BY_ROW, SEARCH)
    if BY_ROW:
        first = tl.where((number - begin) % BLOCK == 0, number, end)
    else:
        first = begin + (number - begin // BLOCK - segment) * BLOCK
    return segment, first, end


@triton.jit
def find_matrix(
    addresses, tensors, table, slot, SIDE_B: tl.constexpr, RANK_FAST: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """(address, rank, stride along rank, stride along columns, wide, its tensor's address, whether that is known).

    A tensor's address is 0 where no gradient is wanted. It is not known, and the rank is 0, where a captured call meets
    an adapter in a tensor that came after the capture.

    ``wide``: the matrix lies as RANK_FAST says (neighbours in rank adjacent, else neighbours in column), in whole
    vectors of 16 bytes.
    """
    row = table + tl.cast(slot, tl.int64) * COLUMNS
    rank = tl.load(row + RANK).to(tl.int32)
    if SIDE_B:
        tensor = tl.load(row + B_TENSOR)
        offset = tl.load(row + B_OFFSET)
        stride_c = tl.load(row + B_N)
        stride_r = tl.load(row + B_R)
    else:
        tensor = tl.load(row + A_TENSOR)
        offset = tl.load(row + A_OFFSET)
        stride_c = tl.cast(1, tl.int64)
        stride_r = tl.load(row + A_ROW)
    # An adapter without matrices has nowhere to look.
    known = (tensor < tensors) | (rank == 0)
    base = tl.load(addresses + tensor, mask=tensor < tensors, other=0)
    address = base + offset * (DTYPE.primitive_bitwidth // 8)
    whole: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    if RANK_FAST:
        wide = (stride_r == 1) & (stride_c % whole == 0) & (rank % whole == 0)
    else:
        wide = (stride_c == 1) & (stride_r % whole == 0)
    return address, tl.where(known, rank, 0), stride_r, stride_c, wide & (address % 16 == 0), base, known


@triton.jit
def find_vector(vectors, count, table, slot, inside, VECTOR: tl.constexpr):
    """(pointer, whether the adapter has one, whether it can be read if it has) of a vector; ``vectors``: addresses.

    Not ``inside``: there is no such slot, and no vector.

    It cannot be read where a captured call meets a vector in a tensor that came after the capture.
    """
    row = table + tl.cast(slot, tl.int64) * COLUMNS + VECTORS + 2 * VECTOR
    tensor = tl.load(row, mask=inside, other=-1)
    known = tensor < count
    there = (tensor >= 0) & known
    base = tl.load(vectors + tensor, mask=there, other=0)
    address = tl.where(base != 0, base + tl.load(row + 1, mask=inside, other=0) * 4, 0)
    return address.to(tl.pointer_type(tl.float32)), there, known


@triton.jit
def load_vector(vector, there, index, length, OTHER: tl.constexpr):
    """Elements of a vector, OTHER where the adapter has none, and beyond its end."""
    return tl.load(vector + index, mask=index < tl.where(there, length, 0), other=OTHER)


@triton.jit
def store_vector(vector, value, index, length):
    """The counterpart of ``load_vector``."""
    tl.store(vector + index, value, mask=index < length)


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """The pointer of an address, with a promise of alignment if WIDE."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _steps(rank, column, stride_r, stride_c, RANK_FAST: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr):
    # ``x // v * v`` and not a hint: a hint would stick to the value, and hold in the other branch too.
    if WIDE:
        if RANK_FAST:
            steps = column.to(tl.int64) * (stride_c // VECTOR * VECTOR) + rank
        else:
            steps = rank.to(tl.int64) * (stride_r // VECTOR * VECTOR) + column
    else:
        steps = rank.to(tl.int64) * stride_r + column.to(tl.int64) * stride_c
    return steps


@triton.jit
def load_weights(
    weight, rank, column, R, C, stride_r, stride_c, RANK_FAST: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Elements (rank, column), zero outside. ``rank`` and ``column``: indices that broadcast against each other."""
    VECTOR: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
    if WIDE and RANK_FAST:
        R = R // VECTOR * VECTOR
    steps = _steps(rank, column, stride_r, stride_c, RANK_FAST, WIDE, VECTOR)
    return tl.load(weight + steps, mask=(rank < R) & (column < C), other=0.0)


@triton.jit
def store_weights(
    weight, value, rank, column, R, C, stride_r, stride_c, RANK_FAST: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The counterpart of ``load_weights``."""
    VECTOR: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
    if WIDE and RANK_FAST:
        R = R // VECTOR * VECTOR
    steps = _steps(rank, column, stride_r, stride_c, RANK_FAST, WIDE, VECTOR)
    tl.store(weight + steps, value, mask=(rank < R) & (column < C))


@triton.jit
def dropout_of(dropout_p, slot):
    """(threshold of ``keep_tile``, 1 / (1 - p)) of a slot's probability, from double precision as everywhere."""
    p = tl.load(dropout_p + slot)
    return (p * 4294967296.0).to(tl.int64).to(tl.int32), (1.0 / (1.0 - p)).to(tl.float32)
