"""sgmv_add: the branch of multi_lora_linear, added in place to an output that is there already.

out_t += s[a_t] B[a_t] A[a_t] x_t         rounded once; rows without an adapter keep their bits
"""

from __future__ import annotations

from ..dispatch.registry import define
from ..problem import Problem
from .checks import accumulate_dtype, check_fits
from .multi_lora_linear import _describe_fwd, multi_lora_linear_fwd_ref, rank_rows


def sgmv_add_ref(out, x, weights, table, scaling, max_rank, order, starts):
    """Changes ``out`` (M, N), returns nothing."""
    acc, N = accumulate_dtype(x.dtype), out.shape[1]
    delta, _ = multi_lora_linear_fwd_ref(
        x.to(acc), None, N, None, weights, table, scaling, max_rank, order, starts, None, None
    )
    rows = order[: starts[table.shape[0]]].long()
    invalid = order[starts[table.shape[0] + 1] :].long()
    out[rows] = (out[rows].to(acc) + delta[rows]).to(out.dtype)
    out[invalid] = float("nan")


def _describe(out, x, weights, table, scaling, max_rank, order, starts) -> Problem:
    problem = _describe_fwd(x, None, out.shape[-1], None, weights, table, scaling, max_rank, order, starts, None, None)
    check_fits("out", out, (x.shape[0], out.shape[-1]), "(M, N)", x.device, (x.dtype,))
    return Problem(**(vars(problem) | {"op": "sgmv_add"}))


def _fake(*args):
    _describe(*args)


define(
    "sgmv_add",
    "(Tensor(a!) out, Tensor x, Tensor[] weights, Tensor table, Tensor scaling, int max_rank, Tensor order,"
    " Tensor starts) -> ()",
    reference=sgmv_add_ref,
    fake=_fake,
    describe=_describe,
    flops=lambda p, out, x, weights, table, scaling, max_rank, order, starts: (
        2 * rank_rows(p, table, starts) * (p.K + p.N)
    ),
)
