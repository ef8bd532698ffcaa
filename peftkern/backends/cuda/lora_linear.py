"""lora_linear on CUDA: one native call a pass, which starts all its kernels (csrc/cuda/lora_linear/lora_linear.h)."""

from __future__ import annotations

from torch import Tensor

from ...problem import Problem
from ...settings import Settings
from . import native
from .native import rows, vectors, weight

# Bases in codes that the forward pass reads, and for how many rows at most: beyond, panels of W pay.
CODED = frozenset({"nf4", "fp4", "int8", "int4"})
FEW_ROWS = 64

_UNSUPPORTED = {
    "lora_linear_fwd": {"p_b", "save_base"},
    # A scale of the base's output meets dy on its way to dx alone.
    "lora_linear_bwd": {"need_p_b", "need_p_d", "need_g_b", "need_g_d"},
}


def decline(problem: Problem, now: Settings) -> str | None:
    """Why no kernel here can take the problem."""
    if problem.dtype not in native.HALVES:
        return f"has kernels for bfloat16 and float16, not {problem.dtype}"
    found = problem.flags & _UNSUPPORTED.get(problem.op, set())
    if problem.op == "lora_linear_bwd" and problem.flags >= {"g_b", "need_x"}:
        found |= {"g_b"}
    if found:
        return f"no kernel with {', '.join(sorted(found))}"
    if problem.R > 512 or max(problem.M, problem.N, problem.K) >= 2**31:
        return "R is over 512, or a size is 2^31 or more"
    for kind in problem.flags & CODED:
        if problem.M > FEW_ROWS or problem.K == 0:
            return f"reads a base of kind {kind} for up to {FEW_ROWS} rows, K above 0"
    return None


def _base(c) -> Tensor | tuple[str, tuple[Tensor, ...]]:
    return weight(c.base[0]) if c.kind == "dense" else (c.kind, tuple(c.base))


def lora_linear_fwd(c) -> tuple[Tensor, Tensor, Tensor]:
    """(y, u, h), see ``peftkern.ops.lora_linear``."""
    with native.on_device(c.x):
        y, u = native.start(
            native._C.cuda_lora_linear_forward, c.x, rows(c.x), None if c.bias is None else c.bias.contiguous(),
            _base(c), c.lora_A, c.lora_B, c.scaling, c.dropout_p, c.seed, vectors(c.scales),
        )  # fmt: skip
    return y, u, c.x.new_empty(0)


def lora_linear_bwd(c) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """(dx, dA, dB, dbias, vectors' gradients), see ``peftkern.ops.lora_linear``."""
    need = c.need
    with native.on_device(c.dy):
        dx, dA, dB, dbias, dv = native.start(
            native._C.cuda_lora_linear_backward, c.dy, rows(c.dy), rows(c.x) if need.A else None, c.u,
            weight(c.base[0]) if need.x else None, c.lora_A, c.lora_B, c.scaling, c.dropout_p, c.seed, vectors(c.scales),
            need.x, need.A, need.B, need.bias, need.d,
        )  # fmt: skip
        dd = None if dv is None else (dv * c.u).sum(0)
    likes = (c.dy, dx), (c.lora_A, dA), (c.lora_B, dB), *((c.u, t) for t in (dbias, dd, None, None, None, None))
    dx, dA, dB, dbias, *sums = (like.new_empty(0) if t is None else t for like, t in likes)
    return dx, dA, dB, dbias, sums


def lora_row_norm(c) -> Tensor:
    """fp32 (N,), see ``peftkern.ops.lora_row_norm``."""
    W = c.base[0]
    with native.on_device(W):
        return native.start(native._C.cuda_lora_row_norm, W, rows(W), c.lora_A, c.lora_B, c.scaling)


OPS = {"lora_row_norm": lora_row_norm, "lora_linear_fwd": lora_linear_fwd, "lora_linear_bwd": lora_linear_bwd}
