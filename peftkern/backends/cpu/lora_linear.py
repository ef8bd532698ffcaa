"""lora_linear on CPU: the base product with the native low-rank branch around it.

Forward: one pass over x gives u; the base product's epilogue adds branch, scales and bias to each block it completes.
Backward: one pass over dy gives du, the gradient of B and the bias gradient; one pass over x gives the gradient of A;
the input gradient is the forward pattern with W and A. Dropout is drawn again from the seed wherever it acts.
Scale vectors are folded into the small matrices: s d[r] g_d[n] B[n, r] and p_d[k] A[r, k], in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import base_product
from .native import Dropout, column_dot, expand, panel, reduce, scale_copy, vector

# The sums over rows keep up to a few dozen copies of an (R, C) gradient. With more elements than this only a few
# copies fit, too few to occupy the threads, so dy is read twice: by rows for du, by columns for the gradient of B.
_FUSED_ELEMENTS = 1 << 20


def lora_linear_fwd(
    x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed,
    rank_scale, base_in_scale, delta_in_scale, base_out_scale, delta_out_scale, save_base, *, way,
):  # fmt: skip
    """(y, u, h); see peftkern.ops.lora_linear."""
    M, N, R = x.shape[0], weight.shape[0], lora_A.shape[0]
    dropout = Dropout.of(dropout_p, seed)
    base_out_scale, bias = vector(base_out_scale), vector(bias)
    u = torch.empty((M, R), dtype=torch.float32)
    reduce(x, dropout=dropout, p=panel(lora_A, col_scale=vector(delta_in_scale)), out=u, alpha_dot=dropout.scale)
    p = panel(lora_B.t(), alpha=scaling, row_scale=vector(rank_scale), col_scale=vector(delta_out_scale))
    y = torch.empty((M, N), dtype=x.dtype)
    h = torch.empty((M, N), dtype=x.dtype) if save_base else None
    product = y if h is None else h

    def epilogue(r0: int, r1: int, c0: int, c1: int, block: Tensor | None) -> None:
        if block is None:
            block = product[r0:r1, c0:c1]
        elif h is not None:
            h[r0:r1, c0:c1] = block
        expand(y[r0:r1, c0:c1], src=block, v=u, p=p, row0=r0, col0=c0, base_scale=base_out_scale, bias=bias)

    base_product(x, weight, transpose=True, in_scale=base_in_scale, out=product, epilogue=epilogue, way=way)
    return y, u, x.new_empty(0) if h is None else h


def lora_linear_bwd_adapter(
    dy, x, u, h, lora_A, lora_B, scaling, dropout_p, seed, rank_scale, delta_in_scale, delta_out_scale,
    need_A, need_B, need_bias, need_rank_scale, need_delta_in, need_base_out, need_delta_out,
):  # fmt: skip
    """(du, dA, dB, dbias, drank_scale, ddelta_in, dbase_out, ddelta_out); see peftkern.ops.lora_linear."""
    (M, N), R = dy.shape, lora_A.shape[0]
    rank_scale, delta_in_scale, delta_out_scale = (vector(t) for t in (rank_scale, delta_in_scale, delta_out_scale))
    du = torch.empty((M, R), dtype=torch.float32)
    # d goes into the panel, unless its gradient needs dv itself.
    p = panel(
        lora_B.t(), alpha=scaling, row_scale=None if need_rank_scale else rank_scale, col_scale=delta_out_scale
    )  # fmt: skip
    G = _empty(need_B or need_delta_out, R, N)
    dbias = _empty(need_bias, N)
    over_rows = dict(v=u.contiguous() if G.dim() == 2 else None, g=G if G.dim() == 2 else None,
                     colsum=dbias if need_bias else None)  # fmt: skip
    if R * N <= _FUSED_ELEMENTS:
        reduce(dy, p=p, out=du, **over_rows)
    else:
        reduce(dy, p=p, out=du)
        if G.dim() == 2 or need_bias:
            reduce(dy, **over_rows)
    drank_scale = _empty(need_rank_scale, R)
    if need_rank_scale:
        column_dot(du, u, drank_scale)
        if rank_scale is not None:
            du *= rank_scale
    # G = u^T dy, so H^T = d G.
    dB = lora_B.new_empty(lora_B.shape if need_B else 0)
    if need_B and dB.numel():
        scale_copy(G, dB.t(), alpha=scaling, row_scale=rank_scale, col_scale=delta_out_scale)
    ddelta_out = _empty(need_delta_out, N)
    if need_delta_out:
        if rank_scale is not None:
            G *= rank_scale[:, None]
        column_dot(G, lora_B.t(), ddelta_out)
        ddelta_out *= scaling
    dbase_out = _empty(need_base_out, N)
    if need_base_out:
        column_dot(dy, h, dbase_out)
    dA, ddelta_in = _grad_A(x, du, lora_A, Dropout.of(dropout_p, seed), delta_in_scale, need_A, need_delta_in)
    return du, dA, dB, dbias, drank_scale, ddelta_in, dbase_out, ddelta_out


def _empty(need: bool, *shape: int) -> Tensor:
    return torch.empty(shape if need else 0, dtype=torch.float32)


def _grad_A(x, du, lora_A, dropout: Dropout, delta_in_scale, need_A: bool, need_delta_in: bool):
    """dA = (du^T drop(x)) p_d and dp_d = coldot(A, du^T drop(x))."""
    G = _empty(need_A or need_delta_in, *lora_A.shape)
    ddelta_in = _empty(need_delta_in, lora_A.shape[1])
    if need_A or need_delta_in:
        reduce(x, dropout=dropout, v=du, g=G, alpha_outer=dropout.scale)
    if need_delta_in:
        column_dot(G, lora_A, ddelta_in)
    if not need_A:
        return lora_A.new_empty(0), ddelta_in
    if lora_A.dtype == torch.float32 and delta_in_scale is None:
        return G, ddelta_in
    dA = torch.empty(lora_A.shape, dtype=lora_A.dtype)
    if dA.numel():
        scale_copy(G, dA, col_scale=delta_in_scale)
    return dA, ddelta_in


def lora_linear_bwd_input(
    dy, du, x, weight, lora_A, dropout_p, seed, base_in_scale, delta_in_scale, base_out_scale, need_base_in, *, way
):
    """(dx, dbase_in); see peftkern.ops.lora_linear."""
    M, K = dy.shape[0], weight.shape[1]
    dropout = Dropout.of(dropout_p, seed)
    base_in_scale = vector(base_in_scale)
    p, du = panel(lora_A, col_scale=vector(delta_in_scale)), du.contiguous()
    dx = torch.empty((M, K), dtype=dy.dtype)
    dbase_in = torch.zeros(K if need_base_in else 0, dtype=torch.float32)

    def epilogue(r0: int, r1: int, c0: int, c1: int, block: Tensor | None) -> None:
        out = dx[r0:r1, c0:c1]
        product = out if block is None else block
        if need_base_in:
            column_dot(product, x[r0:r1, c0:c1], dbase_in[c0:c1], accumulate=True)
        expand(
            out, src=product, v=du, p=p, alpha=dropout.scale, dropout=dropout, row0=r0, col0=c0,
            base_scale=base_in_scale,
        )  # fmt: skip

    base_product(dy, weight, transpose=False, in_scale=base_out_scale, out=dx, epilogue=epilogue, way=way)
    return dx, dbase_in


OPS = {
    "lora_linear_fwd": lora_linear_fwd,
    "lora_linear_bwd_adapter": lora_linear_bwd_adapter,
    "lora_linear_bwd_input": lora_linear_bwd_input,
}
