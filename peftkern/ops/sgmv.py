"""sgmv_add: the branch of multi_lora_linear, added in place to an output that is there already.

out_t += s[a_t] B[a_t] A[a_t] x_t         rounded once; rows without an adapter keep their bits
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import Tensor

from ..checks import accumulate_dtype, check_fits
from ..dispatch.registry import Out, define
from ..problem import Problem
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

    def forward(self, x: Tensor) -> MultiForward:
        """The branch of ``x`` by itself."""
        return MultiForward(
            x, [], NO_BASE, self.out.shape[-1], None, self.weights, self.table, self.scaling, self.max_rank,
            self.order, self.starts, None, None,
        )  # fmt: skip


def sgmv_add_ref(c: Add) -> None:
    """Changes ``out`` (M, N), returns nothing."""
    out, acc, slots = c.out, accumulate_dtype(c.x.dtype), c.table.shape[0]
    delta, _ = multi_lora_linear_fwd_ref(c.forward(c.x.to(acc)))
    rows, invalid = c.order[: c.starts[slots]].long(), c.order[c.starts[slots + 1] :].long()
    out[rows] = (out[rows].to(acc) + delta[rows]).to(out.dtype)
    out[invalid] = float("nan")


def _describe(c: Add) -> Problem:
    problem = describe_fwd(c.forward(c.x))
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
