"""The table of many adapters: a row of int64 for each slot, which says where an adapter's matrices and vectors lie.

Matrices lie in a list of tensors, ``weights``, vectors in another, ``vectors``, which is in fp32 (fp64 for fp64). So a
list of matrices and a bank with many adapters in one tensor are the same to a kernel. Offsets and strides count elements
from a tensor's first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ..equation import PLACES

# The vectors that an adapter may have and the axis of each: one for each place of the equation, a bias of its own, and one
# of the rank, which is added before the activation.
BETA, RANK_BIAS = "beta", "b"
AXES = {**{place.symbol: place.axis for place in PLACES}, BETA: "N", RANK_BIAS: "R"}
# What acts where an adapter has an activation, beside the symbols of vectors.
PHI = "phi"
# Those that act on the base and not on the branch.
BESIDE = ("p_b", "g_b", BETA)

# A's columns are adjacent. PADDED: rows of A and of B^T are adjacent, and zeros follow them up to a multiple of 16 columns.
MATRICES = ("ID", "RANK", "A_TENSOR", "A_OFFSET", "A_ROW", "B_TENSOR", "B_OFFSET", "B_N", "B_R", "PADDED")
ID, RANK, A_TENSOR, A_OFFSET, A_ROW, B_TENSOR, B_OFFSET, B_N, B_R, PADDED = range(len(MATRICES))
# Of each vector the tensor, ABSENT where the adapter has none, and the offset; last the code of the activation.
COLUMNS = (*MATRICES, *(f"{symbol}_{part}" for symbol in AXES for part in ("TENSOR", "OFFSET")), "ACTIVATION")
ACTIVATION = len(COLUMNS) - 1
ABSENT = -1
FREE = -2  # the id of a slot without an adapter: no row may ask for it

Row = Sequence[int]


def vector_column(symbol: str) -> int:
    """The column of a vector's tensor; its offset is in the next."""
    return COLUMNS.index(f"{symbol}_TENSOR")


def table_row(*matrices: int, activation: int = 0, **vectors: tuple[int, int]) -> list[int]:
    """A row from the columns of the matrices in their order, the code of the activation (peftkern/activations.py), 0 for
    none, and, by symbol, the (tensor, offset) of each vector."""
    row = [*matrices, *[ABSENT, 0] * len(AXES), activation]
    for symbol, place in vectors.items():
        column = vector_column(symbol)
        row[column : column + 2] = place
    return row


def matrix_A(weights: Sequence[Tensor], row: Row, in_features: int) -> Tensor:
    """The view A (R, K) of the adapter in a table row."""
    return _view(weights, row, A_TENSOR, (row[RANK], in_features), (row[A_ROW], 1))


def matrix_B(weights: Sequence[Tensor], row: Row, out_features: int) -> Tensor:
    """The view B (N, R) of the adapter in a table row."""
    return _view(weights, row, B_TENSOR, (out_features, row[RANK]), (row[B_N], row[B_R]))


def vectors_at(
    vectors: Sequence[Tensor], row: Row, sizes: Mapping[str, int], symbols: Iterable[str] = AXES
) -> dict[str, Tensor | None]:
    """The views of an adapter's vectors by symbol, None where it has none. ``sizes``: of the axes."""
    found = {}
    for symbol in symbols:
        column = vector_column(symbol)
        present = row[column] != ABSENT
        found[symbol] = _view(vectors, row, column, (sizes[AXES[symbol]],), (1,)) if present else None
    return found


def _view(tensors: Sequence[Tensor], row: Row, column: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    t = tensors[row[column]]
    return t.as_strided(size, stride, t.storage_offset() + row[column + 1])
