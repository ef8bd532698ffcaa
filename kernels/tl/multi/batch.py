"""A batch whose rows take different adapters, as what the kernels of a call share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..call import Settings
from ..operand import vector
from . import configs as multi_configs
from .route import addresses_of

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Adapters(NamedTuple):
    """The adapters of a call and which rows are whose, as in ``peftkern.ops.multi_lora_linear``.

    ``acting``: the symbols of the vectors that some adapter has.
    """

    weights: list[Tensor]
    table: Tensor
    scaling: Tensor | None
    max_rank: int
    order: Tensor
    starts: Tensor
    dropout_p: Tensor | None = None
    seed: Tensor | None = None
    vectors: list[Tensor] = ()
    acting: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Batch:
    """What all kernels of a call share. ``dtype``: of the adapters. ``rank_fast_b``: how their B are expected to lie."""

    addresses: Tensor
    tensors: int
    dtype: torch.dtype
    rank_fast_b: bool
    table: Tensor
    scaling: Tensor | None
    order: Tensor
    starts: Tensor
    max_rank: int
    dropout_p: Tensor | None
    seed: Tensor | None
    vector_addresses: Tensor | None
    count: int
    acting: frozenset[str]
    s: Settings

    @property
    def slots(self) -> int:
        """Rows of the table."""
        return self.table.shape[0]

    @property
    def weights(self) -> dict:
        """Arguments of a kernel that reads adapters."""
        return dict(addresses=self.addresses, tensors=self.tensors)

    @property
    def route(self) -> dict:
        """Arguments of every kernel that takes tiles or segments."""
        return dict(starts=self.starts, table=self.table, M=self.order.shape[0], slots=self.slots)

    @property
    def vectors(self) -> dict:
        """Arguments of a kernel that reads vectors."""
        return dict(vectors=self.vector_addresses, count=self.count)

    def branch(self, side_b: bool) -> dict:
        """Constants of a kernel that reads vectors of the branch: along the rank, which is side B's, and the columns."""
        return dict(ROW=side_b and "d" in self.acting, COL=self.columns(side_b))

    def columns(self, side_b: bool) -> bool:
        """Whether some adapter has a vector along the branch's columns of that side."""
        return ("g_d" if side_b else "p_d") in self.acting

    def drop(self, side_b: bool) -> dict:
        """Arguments of a kernel that drops, which is at A's side."""
        acts = not side_b and self.dropout_p is not None
        return dict(dropout_p=self.dropout_p if acts else None, seed=self.seed if acts else None)

    def scale(self, side_b: bool) -> Tensor | None:
        """The adapters' scaling, which acts at B's side."""
        return self.scaling if side_b else None

    def matrix(self, side_b: bool) -> dict:
        """Constants of a kernel that reads or writes adapters."""
        return dict(SIDE_B=side_b, RANK_FAST=side_b and self.rank_fast_b, DTYPE=_TRITON[self.dtype])

    def tiles(self, rows: int) -> tuple[int, dict]:
        """(tile numbers, constants of a kernel that takes tiles of so many rows)."""
        numbers, by_row = multi_configs.tile_numbers(self.order.shape[0], self.slots, rows)
        return numbers, dict(BLOCK_M=rows, BY_ROW=by_row, SEARCH=multi_configs.search_block(self.slots))


def batch(given: Adapters, like: Tensor, s: Settings) -> Batch:
    """The batch of a call; ``like``: x or dy."""
    weights, vectors = list(given.weights), list(given.vectors)
    return Batch(
        addresses_of(weights, like.device, keep=True), len(weights), weights[0].dtype if weights else like.dtype,
        any(w.dim() > 1 for w in weights), given.table.contiguous(), vector(given.scaling), given.order.contiguous(),
        given.starts.contiguous(), given.max_rank, vector(given.dropout_p), given.seed,
        addresses_of(vectors, like.device, keep=True) if vectors else None, len(vectors), given.acting, s,
    )  # fmt: skip
