"""bottleneck_adapter as launches. The equation, sizes and dtypes are those of ``peftkern/ops/bottleneck_adapter.py``.

Both passes are one ``Branch``: forward from h through down and up, backward from dy through up and down. The gradients of
matrices and columns are one pass over dy and one over h (``lora_linear_grad.one_pass``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import configs, launch
from ..call import Dropout, Settings
from ..configs import cdiv
from ..lora_linear import Finish, add_blocks, add_rows, expand_terms, shrink, shrink_parts, terms
from ..lora_linear_grad import Pass, finish, one_pass
from ..operand import row_stride, rows_of, vector
from .kernel import bottleneck_kernel, bottleneck_out_kernel, bottleneck_rank_kernel

RANK_ROWS = 16


class Forward(NamedTuple):
    """``residual``: None for h. ``first``, ``last``: what is dropped, h or what is added."""

    h: Tensor
    residual: Tensor | None
    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    gate: Tensor | None
    out_scale: Tensor | None
    activation: str
    scaling: float
    first: Dropout
    last: Dropout


class Needs(NamedTuple):
    """Which gradients are wanted."""

    h: bool
    down: bool
    up: bool
    down_bias: bool
    up_bias: bool
    gate: bool
    out_scale: bool


class Backward(NamedTuple):
    """``through``: h was the residual."""

    dy: Tensor
    h: Tensor | None
    t: Tensor
    down: Tensor
    up: Tensor
    up_bias: Tensor | None
    gate: Tensor | None
    out_scale: Tensor | None
    activation: str
    scaling: float
    first: Dropout
    last: Dropout
    through: bool
    needs: Needs


class Branch(NamedTuple):
    """x through ``a`` (R, columns of x), the activation, and ``b`` (columns of out, R) onto the residual; see kernel.py.

    ``out``: None if only what is in between is wanted.
    """

    x: Tensor
    a: Tensor
    a_scale: Tensor | None
    first: Dropout
    rank: _Rank
    out: Tensor | None
    b: Tensor
    b_scale: Tensor | None
    bias: Tensor | None
    last: Dropout
    residual: Tensor | None


class _Rank(NamedTuple):
    # What happens to a sum, and where its results go; of v, z, dots and sums those that are wanted.
    activation: str
    factor: float
    t: Tensor
    gate: Tensor | None
    scaling: float = 1.0
    bias: Tensor | None = None
    backward: bool = False
    v: Tensor | None = None
    z: Tensor | None = None
    dots: bool = False
    sums: bool = False

    def scaled(self, by: float) -> _Rank:
        """The same of a sum that is still to be multiplied by that."""
        return self._replace(factor=self.factor * by)

    def args(self, rows: int, chunks: int) -> dict:
        """Arguments of a kernel whose tiles are of so many rows, and the rank in so many chunks."""
        M, R = self.t.shape

        def buffer(wanted: bool, *shape: int) -> Tensor | None:
            return torch.empty(shape, dtype=torch.float32, device=self.t.device) if wanted else None

        return dict(
            rank_bias=self.bias, t=self.t, v=self.v, z=self.z, gate=self.gate, dots=buffer(self.dots, chunks, M),
            sums=buffer(self.sums, cdiv(M, rows), R), M=M, R=R, factor=self.factor, scaling=self.scaling,
        )  # fmt: skip


def _run(c: Branch, s: Settings) -> tuple[Tensor | None, Tensor | None]:
    """Fills ``out`` and the tensors of ``rank``; (dots (M), sums (R)), if wanted."""
    (M, K), R, size = c.x.shape, c.a.shape[0], c.x.element_size()
    config = s.config("bottleneck", configs.bottleneck(K, R, size, s.arch), size)
    fits = R <= config.rank
    if fits and s.pick("bottleneck_fused", configs.bottleneck_fused(M, config)):
        found = _fused(c, config, s)
    else:
        found = _composed(c, config, fits, s)
    return tuple(None if t is None else add_rows(t) for t in (found["dots"], found["sums"]))


def _fused(c: Branch, config: configs.LaunchConfig, s: Settings) -> dict:
    out, x, b = c.out, c.x, c.b
    x_terms, a_terms = terms(x.dtype, c.a.dtype, c.a_scale is not None, s.allow_tf32)
    v_terms, b_terms = expand_terms(x.dtype, b.dtype, c.b_scale is not None)
    rank = c.rank.scaled(c.first.factor).args(config.block_m, 1)
    drop = c.last if c.last.acts else c.first
    args = dict(
        **rank, out=out, x=x, a=c.a, in_scale=c.a_scale, K=x.shape[1], N=0 if out is None else out.shape[1],
        stride_x=row_stride(x), stride_a_rank=c.a.stride(0), stride_a_k=c.a.stride(1),
        seed_in=c.first.args["seed"], threshold=drop.args["threshold"], **_onto(c),
    )  # fmt: skip
    constants = dict(
        BLOCK_M=config.block_m, BLOCK_N=config.block_c, BLOCK_K=config.block_k, RANK=config.rank,
        ACTIVATION=c.rank.activation, BACKWARD=c.rank.backward, X_TERMS=x_terms, A_TERMS=a_terms, V_TERMS=v_terms,
        B_TERMS=b_terms, R_ALIGN=configs.alignment(rank["R"]), B_ALIGN=configs.alignment(args["stride_b_col"]),
        PRECISION=s.precision,
    )  # fmt: skip
    grid = (cdiv(rank["M"], config.block_m),)
    launch.submit(launch.Launch(bottleneck_kernel, grid, args, constants, config.warps, config.stages))
    return rank


def _onto(c: Branch) -> dict:
    # What both kernels that write ``out`` are given.
    if c.out is None:
        return dict(
            b=None, column_scale=None, column_bias=None, residual=None, seed_out=None, stride_b_col=0, stride_b_rank=0,
            stride_residual=0, inverse_keep=1.0,
        )  # fmt: skip
    return dict(
        b=c.b, column_scale=c.b_scale, column_bias=c.bias, residual=c.residual, seed_out=c.last.args["seed"],
        stride_b_col=c.b.stride(0), stride_b_rank=c.b.stride(1),
        stride_residual=0 if c.residual is None else row_stride(c.residual), inverse_keep=c.last.factor,
    )  # fmt: skip


def _composed(c: Branch, config: configs.LaunchConfig, fits: bool, s: Settings) -> dict:
    (M, _), R = c.x.shape, c.a.shape[0]
    if fits:  # the fused kernel's tiles, and so its bits
        parts = shrink_parts(c.x, c.a, c.a_scale, c.first, config, s)
        rank = c.rank.scaled(c.first.factor)
    else:
        parts, rank = shrink(c.x, c.a, c.a_scale, c.first, s)[None], c.rank
    if rank.v is None and c.out is not None:
        rank = rank._replace(v=torch.empty_like(rank.t))
    chunk = configs.rank_block(R, 64)
    args = rank.args(RANK_ROWS, cdiv(R, chunk))
    constants = dict(
        BLOCK_M=RANK_ROWS, RANK=chunk, ACTIVATION=rank.activation, BACKWARD=rank.backward, R_ALIGN=configs.alignment(R)
    )
    grid = (cdiv(M, RANK_ROWS), cdiv(R, chunk))
    given = dict(args, parts=parts, blocks=parts.shape[0])
    launch.submit(launch.Launch(bottleneck_rank_kernel, grid, given, constants, 4, 2))
    if c.out is not None:
        _outwards(c, rank.v, config, s)
    return args


def _outwards(c: Branch, v: Tensor, config: configs.LaunchConfig, s: Settings) -> None:
    (M, N), R = c.out.shape, v.shape[1]
    rank = config.rank if R <= config.rank else min(config.rank, 32)
    v_terms, b_terms = expand_terms(c.out.dtype, c.b.dtype, c.b_scale is not None)
    args = dict(
        out=c.out, v=v, gate=c.rank.gate if c.bias is not None else None, M=M, N=N, R=R, stride_v=R, scaling=c.rank.scaling,
        threshold=c.last.args["threshold"], **_onto(c),
    )  # fmt: skip
    constants = dict(
        BLOCK_M=config.block_m, BLOCK_N=config.block_c, RANK=rank, CHUNKS=cdiv(R, rank), V_TERMS=v_terms,
        B_TERMS=b_terms, GROUP=config.group, R_ALIGN=configs.alignment(R),
        B_ALIGN=configs.alignment(args["stride_b_col"]), PRECISION=s.precision,
    )  # fmt: skip
    grid = (cdiv(M, config.block_m) * cdiv(N, config.block_c),)
    launch.submit(launch.Launch(bottleneck_out_kernel, grid, args, constants, config.warps, config.stages))


def forward(c: Forward, s: Settings) -> tuple[Tensor, Tensor]:
    """(y, t) of ``bottleneck_adapter_fwd``."""
    h, gate = rows_of(c.h), vector(c.gate)
    residual = h if c.residual is None else rows_of(c.residual)
    y = h.new_empty((h.shape[0], c.up.shape[0]))
    t = h.new_empty((h.shape[0], c.down.shape[0]), dtype=torch.float32)
    rank = _Rank(c.activation, 1.0, t, gate, c.scaling, vector(c.down_bias))
    out = None if y.numel() == 0 else y
    branch = Branch(h, c.down, None, c.first, rank, out, c.up, vector(c.out_scale), vector(c.up_bias), c.last, residual)
    _run(branch, s)
    return y, t


def backward(c: Backward, s: Settings) -> tuple[Tensor, ...]:
    """(dh, ddown, dup, ddown_bias, dup_bias, dgate, dout_scale) of ``bottleneck_adapter_bwd``; what is not needed is empty."""
    need, (M, N), (R, K) = c.needs, c.dy.shape, c.down.shape
    c = c._replace(dy=rows_of(c.dy), up_bias=vector(c.up_bias), gate=vector(c.gate), out_scale=vector(c.out_scale))

    def zeros(wanted: bool, *shape: int) -> Tensor:
        return c.t.new_zeros(shape if wanted else 0)

    def buffer(wanted: bool) -> Tensor | None:
        return c.t.new_empty((M, R)) if wanted else None

    dh = c.dy.new_empty((M, K) if need.h else 0)
    dD, dU = (m.new_zeros(m.shape if wanted else 0) for m, wanted in ((c.down, need.down), (c.up, need.up)))
    sums = zeros(need.up_bias, N), zeros(need.out_scale, N)
    if M == 0:
        return dh, dD, dU, zeros(need.down_bias, R), sums[0], zeros(need.gate, M), sums[1]
    dt, z = buffer(need.down), buffer(need.up or need.out_scale)
    dots = sums_down = None
    if need.h or need.down_bias or need.gate or dt is not None or z is not None:
        rank = _Rank(
            c.activation,
            c.scaling,
            c.t.contiguous(),
            c.gate,
            backward=True,
            v=dt,
            z=z,
            dots=need.gate,
            sums=need.down_bias,
        )
        branch = Branch(
            c.dy, c.up.t(), c.out_scale, c.last, rank, dh if dh.numel() > 0 else None, c.down.t(), None, None, c.first,
            c.dy if c.through else None,
        )  # fmt: skip
        dots, sums_down = _run(branch, s)
    if need.gate and c.up_bias is not None and N > 0:
        dots = dots + _along_bias(c, s)
    if dt is not None and R > 0 and K > 0:
        grad, *_ = one_pass(Pass(rows_of(c.h), R, c.down.dtype, dt, drop=c.first), s)
        finish(grad, dD, False, c.down.t(), None, c.first.factor, False)
    if N > 0 and (need.up or need.up_bias or need.out_scale):
        sums = _over_dy(c, z, dU, s)
    return (
        dh,
        dD,
        dU,
        sums_down if need.down_bias else zeros(False),
        sums[0],
        dots if need.gate else zeros(False),
        sums[1],
    )


def _along_bias(c: Backward, s: Settings) -> Tensor:
    """What the bias gives of the gate's gradient (M): a product with a single row."""
    row = c.up_bias.float() if c.out_scale is None else c.up_bias.float() * c.out_scale
    (M, N), size = c.dy.shape, c.dy.element_size()
    config = s.config("bottleneck", configs.bottleneck(N, 1, size, s.arch), size)
    out = c.t.new_empty((M, 1))
    parts = shrink_parts(c.dy, row[None], None, c.last, config, s)
    add_blocks(out, parts, Finish(c.scaling * c.last.factor))
    return out[:, 0]


def _over_dy(c: Backward, z: Tensor | None, dU: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """(dup_bias, dout_scale), as far as they are needed; fills dU."""
    need, R, factor, empty = c.needs, c.up.shape[1], c.scaling * c.last.factor, c.t.new_empty(0)
    wants_sums = need.up_bias or (need.out_scale and c.up_bias is not None)
    z = None if z is None or R == 0 else z
    grad, _, columns, _ = one_pass(
        Pass(c.dy, R, c.up.dtype, z, sums=wants_sums, drop=c.last, weights=c.gate if wants_sums else None), s
    )
    db, dc = empty, c.t.new_zeros(c.dy.shape[1]) if need.out_scale else empty
    if z is not None:
        dots = finish(grad, dU if need.up else None, True, c.up, c.out_scale, factor, need.out_scale)
        dc = dots if need.out_scale else dc
    if wants_sums:
        S = add_rows(columns) * factor
        if need.up_bias:
            db = S if c.out_scale is None else S * c.out_scale
        if need.out_scale and c.up_bias is not None:
            dc = dc + S * c.up_bias
    return db, dc
