"""Pairs of columns of an activation, rotated and scaled: what RoAd does to a layer's output.

    y_a = x_a c_a - x_b s_a        y_b = x_b c_b + x_a s_b        c = alpha cos(theta), s = alpha sin(theta)

Columns come in groups of two halves; a is a column of the first half, b the one at its place in the second. In torch's own
steps, a block of rows at a time, so no array beside x and y is made. Saved for backward: x if theta or alpha trains.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import FLOATING, accumulate_dtype, check_fits
from .saved import first_only, kept_input, read_saved
from .shapes import as_shape, cast, rows_of, uncast

BLOCK = 1 << 16  # numbers that are taken together, so that they stay in a cache between the steps
_NAMES = "x", "alpha", "cos", "sin"


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    x = tensors[0]
    if x.numel() <= BLOCK or not x.is_cpu:
        return iter([tensors])
    rows = max(64, BLOCK // x[0].numel())
    return zip(*(t.split(rows) for t in tensors))


def _mix(x: Tensor, c: Tensor, of_b: Tensor, of_a: Tensor) -> Tensor:
    # (M, G, 2, half), with c (G, 2, half): a c_a + b of_b in the first halves, b c_b + a of_a in the second.
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for h, block in _blocks(x, y):
        wide = torch.mul(h, c, out=block) if block.dtype == c.dtype else h * c
        (a, b), (y_a, y_b) = h.unbind(2), wide.unbind(2)
        y_a.addcmul_(b, of_b)
        y_b.addcmul_(a, of_a)
        if wide is not block:
            block.copy_(wide)
    return y


def _made(alpha: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    # c and s (G, 2, half), or (G, 1, half) where both of a pair share them. Of four halves two are c's, two are s's.
    if alpha.shape[1] == 4:
        return alpha[:, :2] * cos[:, :2], alpha[:, 2:] * sin[:, 2:]
    return alpha * cos, alpha * sin


class PairRotateFunction(torch.autograd.Function):
    """``pair_rotate`` with its gradients: x (M, G, 2, half), theta and alpha (G, 1, 2 or 4, half) in the dtype of sums."""

    @staticmethod
    def forward(ctx, x, theta, alpha):
        cos, sin = theta.cos(), theta.sin()
        trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        kept = (x if torch.compiler.is_compiling() else kept_input(x, x, None)) if trains else None
        ctx.save_for_backward(kept, alpha, cos, sin)
        c, s = _made(alpha, cos, sin)
        return _mix(x, c, -s[:, 0], s[:, -1])

    @staticmethod
    @first_only("pair_rotate")
    def backward(ctx, dy):
        readers = lambda n: (n[1] or n[2], any(n), any(n), any(n))  # noqa: E731
        (x, alpha, cos, sin), needs = read_saved(ctx, "road_linear", lambda: _NAMES, readers)
        dx = dtheta = dalpha = None
        if needs[0]:
            c, s = _made(alpha, cos, sin)
            dx = _mix(dy, c, s[:, -1], -s[:, 0])
        if needs[1] or needs[2]:
            dc, ds = _vectors(dy, x, alpha.dtype)
            if alpha.shape[1] == 4:
                dalpha = torch.cat([cos[:, :2] * dc, sin[:, 2:] * ds], 1)
                dtheta = alpha * torch.cat([-sin[:, :2] * dc, cos[:, 2:] * ds], 1)
            else:
                if alpha.shape[1] == 1:
                    dc, ds = dc.sum(1, keepdim=True), ds.sum(1, keepdim=True)
                dalpha, dtheta = cos * dc + sin * ds, alpha * (cos * ds - sin * dc)
        return dx, dtheta, dalpha


def _vectors(dy: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # The gradients (G, 2, half) of c and s, in blocks of rows.
    of_c, of_a, of_b = [], [], []
    for g, h in _blocks(dy, x):
        g, h = cast(g, dtype), cast(h, dtype)
        (g_a, g_b), (a, b) = g.unbind(2), h.unbind(2)
        of_c.append((g * h).sum(0))
        of_a.append((g_a * b).sum(0))
        of_b.append((g_b * a).sum(0))
    dc, ds_a, ds_b = (p[0] if len(p) == 1 else torch.stack(p).sum(0) for p in (of_c, of_a, of_b))
    return dc, torch.stack([-ds_a, ds_b], 1)


def pair_rotate(x: Tensor, theta: Tensor, alpha: Tensor, group: int) -> Tensor:
    """Pairs of columns of x (..., N), rotated and scaled: the equation at the top of this file.

    Args:
        x: (..., N), N a multiple of ``group``, which is even. Column a goes with a + group / 2, a in a group's first half.
        theta, alpha: N / 2 elements, which both columns of a pair share; N; or 2 N, half of each group's for c, half for s.

    Returns (..., N) in x's dtype. Gradients have their inputs' dtypes. Raises ValueError for other shapes.
    """
    N = x.shape[-1]
    if group < 2 or group % 2 or N % group or not N:
        raise ValueError(f"group_size is {group}, expected an even divisor of N = {N}")
    if theta.dim() != 1 or 2 * len(theta) not in (N, 2 * N, 4 * N):
        raise ValueError(f"road_theta has shape {tuple(theta.shape)}, expected N / 2, N or 2 N elements, N = {N}")
    for name, vector in (("road_theta", theta), ("road_alpha", alpha)):
        check_fits(name, vector, theta.shape, "that of road_theta", x.device, FLOATING)
    acc, half, rows = accumulate_dtype(x.dtype), group // 2, rows_of(x, x.dtype)
    theta, alpha = (cast(t, acc).view(N // group, -1, half) for t in (theta, alpha))
    with uncast(x):
        y = PairRotateFunction.apply(rows.unflatten(1, (N // group, 2, half)), theta, alpha)
    return as_shape(y.flatten(1), x)
