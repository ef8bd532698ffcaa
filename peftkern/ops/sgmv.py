"""sgmv_add: the branch of multi_lora_linear, added in place to an output that is there already.

out_t += s[a] g_d[a] * ((d[a] * ((x_t * p_d[a]) A[a]^T)) B[a]^T)      a = a_t, the slot of row t

rounded once; rows without an adapter keep their bits. Vectors that act on a base have no place here.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import Tensor

from ..checks import accumulate_dtype, check_fits
from ..dispatch.registry import Out, define
from ..problem import Problem
from .adapter_table import BESIDE
from .multi_lora_linear import NO_BASE, MultiForward, describe_fwd, multi_lora_linear_fwd_ref, rank_rows


class Add(NamedTuple):
    """Arguments of ``sgmv_add``: ``out`` (M, N) is changed, nothing is returned."""

    out: Out
    x: Tensor
    weights: list[Tensor]
    table: Tensor
    scaling: Tensor
    max_rank: int
    order: Tensor
    starts: Tensor
    vectors: list[Tensor] | None = None
    acting: str = ""

    def forward(self, x: Tensor) -> MultiForward:
        """The branch of ``x`` by itself."""
        return MultiForward(
            x, [], NO_BASE, self.out.shape[-1], None, self.weights, self.table, self.scaling, self.max_rank,
            self.order, self.starts, None, None, self.vectors, self.acting,
        )  # fmt: skip


def sgmv_add_ref(c: Add) -> None:
    """Changes ``out`` (M, N), returns nothing."""
    out, acc, slots = c.out, accumulate_dtype(c.x.dtype), c.table.shape[0]
    delta, _, _ = multi_lora_linear_fwd_ref(c.forward(c.x.to(acc)))
    rows, invalid = c.order[: c.starts[slots]].long(), c.order[c.starts[slots + 1] :].long()
    out[rows] = (out[rows].to(acc) + delta[rows]).to(out.dtype)
    out[invalid] = float("nan")


def _describe(c: Add) -> Problem:
    problem = describe_fwd(c.forward(c.x))
    if beside := sorted(problem.flags.intersection(BESIDE)):
        raise ValueError(f"acting holds {beside[0]}, which acts on a base: there is none")
    check_fits("out", c.out, (c.x.shape[0], c.out.shape[-1]), "(M, N)", c.x.device, (c.x.dtype,))
    return dataclasses.replace(problem, op="sgmv_add")


def _fake(c: Add) -> None:
    _describe(c)


define(
    "sgmv_add",
    Add,
    "()",
    reference=sgmv_add_ref,
    fake=_fake,
    describe=_describe,
    flops=lambda p, c: 2 * rank_rows(p, c.table, c.starts) * (p.K + p.N),
)
