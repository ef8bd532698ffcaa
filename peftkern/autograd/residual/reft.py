"""ReFT: some rows of a hidden state are edited in a subspace of low rank, all others pass.

    y_p = drop(h_p + z R),   p listed            y_p = h_p,   otherwise

    loreft, noreft     z = f(h_p W^T + b) - h_p R^T         R (r, H): orthonormal rows in loreft and direft, any in the others
    direft, nodireft   z = f(h_p W^T + b)                   W (r, H), b (r)
    consreft           z = b - h_p R^T                      f: an activation, the identity unless said
    lobireft           z = b

and the gradients, for the output gradient dy, with e = drop'(dy_p) and dz = e R^T:

    dt = dz * f'(t)     dW = dt^T h_p     db = sum_p dt     dR = z^T e - dz^T h_p     dh_p = e + dt W - dz R

In torch's own steps on the listed rows alone; y is one copy of h. Saved for backward, each only if a gradient reads it: the
listed rows (B P, H) if R or W trains, z (B P, r), and t (B P, r) where f is not the identity. h itself is not kept.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from ...activations import ACTIVATIONS, activation_name
from ...checks import FLOATING, accumulate_dtype, check_fits, check_tensor
from ...dispatch.registry import caller
from ...dispatch.watch import nobody_watches
from ...ops.dropout_mask import acting, seed_tensor
from ..saved import first_only, read_saved
from ..shapes import cast, no_transforms, uncast

_mask = caller("dropout_mask")
_NAMES = ("h", "z", "t", "rotate", "weight", "seed")


class Variant(NamedTuple):
    """What a variant's z is made of. ``source``: W h + b, otherwise b alone; ``subtracts``: less R h."""

    source: bool
    subtracts: bool


VARIANTS = {
    "loreft": Variant(True, True), "noreft": Variant(True, True), "direft": Variant(True, False),
    "nodireft": Variant(True, False), "consreft": Variant(False, True), "lobireft": Variant(False, False),
}  # fmt: skip


class Rows(NamedTuple):
    """The listed rows, B P entries, on a GPU without a look at their values: no host waits for it.

    ``at``: int64, the row of h seen as (B T, H) that an entry writes; one that is no position writes what another of its
    sequence does. ``first``: of the entries of a row the first, itself for most. ``counts``: whether an entry is its row's
    first, and a position. ``edits``: whether its sequence has a position at all. These three are None where all entries
    are known to be different positions.
    """

    at: Tensor
    first: Tensor | None
    counts: Tensor | None
    edits: Tensor | None

    def once(self, t: Tensor) -> Tensor:
        """t (B P, ...), where what stands there twice counts once, and what is no position not at all."""
        return t if self.counts is None else torch.where(self.counts[:, None], t, 0.0)


class Call(NamedTuple):
    """What a pass takes besides tensors that train."""

    rows: Rows
    variant: Variant
    activation: str
    dropout_p: float


# Of the last few positions: a copy of them, or on a GPU themselves; what else rows depend on; their rows. All layers of a
# model share them.
_recent: tuple[tuple[Tensor | weakref.ref, tuple, Rows], ...] = ()
_KEPT = 4


def _made_rows(positions: Tensor, T: int) -> Rows:
    B, P = positions.shape
    along = torch.arange(P, device=positions.device).expand(B, P)
    # Descending: what is no position comes last, and takes the place of the first.
    ordered, order = positions.sort(dim=1, descending=True, stable=True)
    none = ordered < 0
    leads = torch.cat([torch.ones_like(none[:, :1]), ordered[:, 1:] != ordered[:, :-1]], 1)
    leader = torch.where(leads, along, 0).cummax(1).values.masked_fill(none, 0)
    start = torch.arange(B, device=positions.device)[:, None]
    at = ordered.gather(1, leader).clamp_min(0) + start * T
    first = order.gather(1, leader) + start * P
    back = (order + start * P).flatten()
    flat = (at, first, leads & ~none, ~none[:, :1].expand(B, P))
    return Rows(*(torch.empty_like(v.flatten()).index_copy_(0, back, v.flatten()) for v in flat))


def _check_positions(positions: Tensor, T: int) -> None:
    if positions.numel() and positions.is_cpu and not -1 <= positions.min() <= positions.max() < T:
        found = f"{positions.min()} to {positions.max()}"
        raise ValueError(f"positions are from {found}, expected -1 (none) to {T - 1} for T = {T}")


def _same(given: Tensor | weakref.ref, positions: Tensor) -> bool:
    # No version counts what numpy or ``data`` writes: where a look costs little, numbers are compared.
    return torch.equal(given, positions) if positions.is_cpu else given() is positions


def _state(positions: Tensor, T: int) -> tuple:
    if positions.is_cpu:
        return "cpu", T
    stream = torch._C._cuda_getCurrentRawStream(positions.device.index) if positions.is_cuda else None
    return positions.device, T, positions._version, stream


def _rows(positions: Tensor, T: int) -> Rows:
    global _recent
    known = positions.reshape(1, -1) if positions.dim() == 1 else positions
    known = known if T else known[:, :0]
    if torch.compiler.is_compiling() or (positions.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _made_rows(known, T)
    if positions.is_inference() and not positions.is_cpu:  # it has no version
        return _made_rows(known, T)
    state = _state(positions, T)
    for given, made_for, rows in _recent:
        if made_for == state and _same(given, positions):
            return rows
    _check_positions(positions, T)
    if positions.is_cpu and all(len({*row} - {-1}) == len(row) for row in known.tolist()):
        rows = Rows((known + torch.arange(len(known))[:, None] * T).flatten(), None, None, None)
    else:
        rows = _made_rows(known, T)
    given = positions.detach().clone() if positions.is_cpu else weakref.ref(positions)
    _recent = ((given, state, rows), *_recent[: _KEPT - 1])
    return rows


def _reads(needs: tuple[bool, ...], call: Call) -> tuple[bool, ...]:
    # Which of _NAMES the gradients of (h, rotate, weight, bias) read.
    (source, subtracts), (h, R, W, b) = call.variant, needs[:4]
    return (
        W or (R and subtracts),
        R,
        source and call.activation != "identity" and (h or W or b),
        W or b or (h and (source or subtracts)) or (R and subtracts),
        h and source,
        True,
    )


def _source(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def _dropped(x: Tensor, call: Call, seed: Tensor | None) -> Tensor:
    if not call.dropout_p:
        return x
    keep = _mask(seed, *x.shape, call.dropout_p)
    return torch.where(keep, x * (1.0 / (1.0 - call.dropout_p)), 0.0)


def _write(y: Tensor, edited: Tensor, before: Tensor, rows: Rows) -> None:
    edited = cast(edited, y.dtype)
    if rows.first is not None:  # equal rows get equal bits, whichever entry is written last
        edited = torch.where(rows.edits[:, None], edited, before).index_select(0, rows.first)
    y.flatten(0, -2).index_copy_(0, rows.at, edited)


class ReftFunction(torch.autograd.Function):
    """``reft`` with its gradients."""

    @staticmethod
    def forward(ctx, h, rotate, weight, bias, seed, call):
        variant, acc = call.variant, accumulate_dtype(h.dtype)
        y = h.clone(memory_format=torch.contiguous_format)
        before = y.flatten(0, -2).index_select(0, call.rows.at)
        x, R, b = cast(before, acc), cast(rotate, acc), None if bias is None else cast(bias, acc)
        t = None
        if variant.source:
            t = _source(x, cast(weight, acc), b)
            z = ACTIVATIONS[call.activation].value(t)
        else:
            z = b.expand(len(x), -1)
        if variant.subtracts:
            z = torch.addmm(z, x, R.t(), alpha=-1)
        _write(y, _dropped(torch.addmm(x, z, R), call, seed), before, call.rows)
        saved = [before, z, t, rotate, weight, seed]
        if not torch.compiler.is_compiling():  # a compiler drops what it does not need by itself
            saved = [v if read else None for v, read in zip(saved, _reads(ctx.needs_input_grad, call))]
        ctx.save_for_backward(*saved)
        ctx.call, ctx.dtypes = call, [None if v is None else v.dtype for v in (rotate, weight, bias)]
        return y

    @staticmethod
    @first_only("reft")
    def backward(ctx, dy):
        saved, needs = read_saved(ctx, "reft", lambda: _NAMES, lambda n: _reads(n, ctx.call))
        with uncast(dy):  # where backward runs under autocast
            return *_gradients(ctx, dy, saved, needs), None, None


def _gradients(ctx, dy: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    # Of h, rotate, weight and bias.
    (x, z, t, R, W, seed), call, acc = saved, ctx.call, accumulate_dtype(dy.dtype)
    (source, subtracts), rows = call.variant, call.rows
    dh = dR = dW = db = dz = dt = None
    given = dy.flatten(0, -2).index_select(0, rows.at)
    # What does not count is zeroed everywhere: zero times a row that is not finite, which nobody listed, is not zero.
    e = rows.once(_dropped(cast(given, acc), call, seed))
    if R is not None:
        R = cast(R, acc)
        dz = e @ R.t()
        dt = dz if t is None else rows.once(dz * ACTIVATIONS[call.activation].slope(t))
    if needs[0]:
        dx = torch.addmm(e, dt, cast(W, acc)) if source else e
        dx = torch.addmm(dx, dz, R, alpha=-1) if subtracts else dx
        dh = dy.clone(memory_format=torch.contiguous_format)
        _write(dh, dx, given, rows)
    x = None if x is None else rows.once(cast(x, acc))
    if needs[1]:
        dR = rows.once(z).t() @ e
        if subtracts:
            dR.addmm_(dz.t(), x, alpha=-1)
        dR = cast(dR, ctx.dtypes[0])
    if needs[2]:
        dW = cast(dt.t() @ x, ctx.dtypes[1])
    if needs[3]:
        db = cast(dt.sum(0), ctx.dtypes[2])
    return dh, dR, dW, db


def reft(
    h: Tensor,
    rotate: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    positions: Tensor,
    variant: str = "loreft",
    activation: str = "identity",
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A hidden state, edited at the listed positions: the equation at the top of this file (Wu et al. 2024).

    Args:
        h: (B, T, H), or (T, H) of one sequence, in fp32, bf16 or fp16 (fp64 through torch's steps as well).
        rotate: R (r, H); loreft, direft, consreft and lobireft mean one of orthonormal rows, which nobody checks.
        weight: W (r, H), of the variants that have a source. bias: b (r), optional for them, and all of z for the others.
            Parameters are in fp32 or a half precision, of their own.
        positions: int64 (B, P), or (P) for one sequence: numbers of the call's T rows, -1 for none. What is listed twice is
            edited once. ``reft_positions`` makes them.
        variant: loreft, noreft, direft, nodireft, consreft or lobireft. activation: f, of the variants that have a source.
        dropout_p: drop probability of an edited row as a whole, what the row was included, as in pyreft and AdapterHub's
            ``adapters``. Acts if ``training`` and > 0.
        seed: as in ``bottleneck_adapter``; ``positions[b, j]`` takes the row b P + j of ``dropout_mask`` for (B P, H), of
            equal positions the first.

    Returns:
        (B, T, H) in h's dtype; sums are in fp32 and edited rows are rounded once. Autocast changes nothing. Gradients have
        their arguments' dtypes; that of rotate is as for any matrix, and torch's parametrisation takes it further.

    Raises:
        ValueError, TypeError: an argument that does not fit, named in the message (positions beyond T: on the CPU alone).
        RuntimeError: a second derivative, or use under a torch.func transform.
        NotImplementedError: an argument with a tangent of forward-mode AD.
    """
    if not nobody_watches():
        no_transforms("reft")
    known = _check(h, rotate, weight, bias, positions, variant)
    p = acting(dropout_p, training)
    call = Call(_rows(positions, h.shape[-2]), known, activation_name(activation), p)
    if not known.source and call.activation != "identity":
        raise ValueError(f"activation is {activation!r}, but {variant} has no source that it could act on")
    seed = seed_tensor(seed, h.device) if p > 0.0 else None
    with uncast(h):
        return ReftFunction.apply(h, rotate, weight, bias, seed, call)


def _check(h, rotate, weight, bias, positions, variant) -> Variant:
    check_tensor("h", h)
    if h.dim() not in (2, 3):
        raise ValueError(f"h has shape {tuple(h.shape)}, expected (B, T, H) or (T, H)")
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
    known, dtypes, H = VARIANTS[variant], FLOATING if h.dtype == torch.float64 else FLOATING[:3], h.shape[-1]
    check_tensor("rotate", rotate, dtypes=dtypes)
    r = len(rotate) if rotate.dim() else 0
    check_fits("rotate", rotate, (r, H), "(r, H)", h.device, dtypes)
    if known.source:
        check_fits("weight", weight, (r, H), "(r, H)", h.device, dtypes)
    elif weight is not None:
        raise ValueError(f"weight is given, but {variant} has none")
    if bias is not None or not known.source:
        check_fits("bias", bias, (r,), "(r,)", h.device, dtypes)
    lead, P = h.shape[:-2], positions.shape[-1] if isinstance(positions, Tensor) and positions.dim() else 0
    check_fits("positions", positions, (*lead, P), "(B, P)" if lead else "(P,)", h.device, (torch.int64,))
    return known
