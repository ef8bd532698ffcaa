"""A frozen embedding with low-rank branches as a differentiable function: y = c E[ids] + sum over branches of B A[:, ids].

Every branch is added in place to the rows that were looked up. The gradient of A (R, V) is written where its columns are: no
transposed table on the way. Saved: the ids if an A needs a gradient, A[:, ids] (R, M) of each branch whose B needs a gradient, B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulate_dtype
from .saved import first_only
from .shapes import cast


def _columns_of(du: Tensor, ids: Tensor, V: int, padding: int) -> Tensor:
    # (R, V): the sum of the columns of du (R, M) that have this id.
    if du.is_cuda:  # torch's own sum in an order that does not change from run to run
        return torch.ops.aten.embedding_dense_backward(du.t(), ids, V, padding, False).t()
    dA = du.new_zeros(du.shape[0], V).scatter_add_(1, ids.long().expand_as(du), du)
    if padding >= 0:
        dA[:, padding] = 0
    return dA


def _forward(ids: Tensor, weight: Tensor, scale: float | Tensor | None, wide: bool, pairs: tuple[Tensor, ...]):
    """(y, A[:, ids] of each branch)."""
    flat, looked_up = ids.flatten(), []
    y = torch.embedding(weight, ids)
    if scale is not None:
        y.mul_(scale)
    if pairs[0].dtype != y.dtype:
        y = y.to(torch.promote_types(y.dtype, pairs[0].dtype))
    rows = y.view(flat.shape[0], weight.shape[1])
    for A, B in zip(pairs[::2], pairs[1::2]):
        u = A.index_select(1, flat)
        rows.addmm_(cast(u, y.dtype).t(), cast(B, y.dtype).t())
        looked_up.append(u)
    return y if wide else cast(y, weight.dtype), looked_up


class LoRAEmbeddingFunction(torch.autograd.Function):
    """The equation at the top. ``pairs``: A and B, scaled already, of each branch in turn."""

    @staticmethod
    def forward(ctx, ids, weight, scale, padding, wide, *pairs):
        y, looked_up = _forward(ids, weight, scale, wide, pairs)
        saved: list[Tensor | None] = []
        for B, u, need_B in zip(pairs[1::2], looked_up, ctx.needs_input_grad[6::2]):
            saved += B, u if need_B else None
        ctx.save_for_backward(ids.flatten() if any(ctx.needs_input_grad[5::2]) else None, *saved)
        ctx.size = weight.shape[0], padding
        return y

    @staticmethod
    @first_only("lora_embedding")
    def backward(ctx, dy):
        flat, *saved = ctx.saved_tensors
        needs, grads = ctx.needs_input_grad[5:], []
        dy = dy.reshape(dy.shape[:-1].numel(), dy.shape[-1])
        for B, u, need_A, need_B in zip(saved[::2], saved[1::2], needs[::2], needs[1::2]):
            dA = dB = None
            d = cast(dy, B.dtype)
            if need_A:
                du = cast(B.t() @ d.t(), accumulate_dtype(B.dtype))
                dA = cast(_columns_of(du, flat, *ctx.size), B.dtype)
            if need_B:
                dB = d.t() @ u.t()
            grads += dA, dB
        return None, None, None, None, None, *grads


def lora_embedding(
    ids: Tensor, weight: Tensor, *pairs: Tensor, scale: float | Tensor | None = None, padding: int | None = None,
    wide: bool = False,
) -> Tensor:  # fmt: skip
    """y (..., N) of ids (...), in the table's dtype, or, ``wide``, in that of the adapters where it is wider.

    Args:
        ids: int64 or int32. weight: (V, N), which gets no gradient. scale: c, of the table alone, None for 1.
        pairs: A (R, V) and B (N, R) of each branch, with the branch's scaling in B; in any floating dtype, both the same.
        padding: the id whose column of A gets no gradient, None for none.
    """
    # A compiler gets such a function wrong where nothing needs a gradient
    # (findings/torch_compile_autograd_function_varargs.sh).
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in pairs)):
        return _forward(ids, weight, scale, wide, pairs)[0]
    return LoRAEmbeddingFunction.apply(ids, weight, scale, -1 if padding is None else padding, wide, *pairs)
